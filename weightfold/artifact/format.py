"""The layout of a saved model: one safetensors file whose metadata tells how to build the module for its tensors.

The metadata of `model.safetensors` holds two texts: `weightfold`, the `Structure` below as JSON, and `ledger`, the head
of the ledger of the run that made it. `structure.json` beside it repeats the structure for people and scripts.

A model whose channels were folded is the model that its builder makes, with some tensors of other shapes and some
integer attributes of other values. Only these differences are stored; the code stays where it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from weightfold.artifact.header import Header, read_header
from weightfold.artifact.plain import parse_json
from weightfold.config import Config
from weightfold.errors import ArtifactError, ConfigError

FORMAT = 1
MOST_INPUT = 1 << 28
KEY = "weightfold"
HEAD_KEY = "ledger"
Shape = tuple[int, ...]
Value = int | tuple[int, ...]


class Builder(Config):
    """How to make the module before any edit."""

    kind: Literal["built-in", "function", "folder", "instance"]
    """a built-in network; `package.module:function`; a Hugging Face folder; any module that the user makes"""
    name: str
    """the built-in name, the function, the folder, or the class of the module"""
    task: dict[str, Any] | None = None
    """built-in: the task that the network is built for"""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """built-in: settings that differ from the defaults"""


class Resized(Config):
    """A tensor whose shape an edit changed."""

    before: Shape
    after: Shape


class Attribute(Config):
    """An integer attribute of a module that an edit changed, such as `out_features` or `config.num_heads`."""

    module: str
    """path of the module, "" for the whole model"""
    name: str
    """the attribute; `config.name` reaches into an object that the module holds"""
    before: Value
    after: Value


class Input(Config):
    """One input that the model takes."""

    shape: Shape
    """sizes of its dimensions; the first is the batch"""
    dtype: str = "float32"
    """torch's name of its type"""
    name: str | None = None
    """keyword under which it is passed; None: by position"""
    high: int | None = None
    """whole numbers: they lie below this"""

    @model_validator(mode="after")
    def _it_can_be_made(self) -> Self:
        if any(size < 1 for size in self.shape) or prod(self.shape) > MOST_INPUT:
            raise ConfigError(
                f"An example input holds 1 to {MOST_INPUT:,} numbers. Got the shape {self.shape} instead."
            )
        return self


class Structure(Config):
    """What must be known besides the tensors to rebuild a saved model.

    Example:
        >>> plain = Structure(builder=Builder(kind="built-in", name="mlp"), fingerprint="0" * 64)
        >>> Structure.from_json(plain.to_json()) == plain
        True
    """

    format: Literal[1] = FORMAT
    builder: Builder
    sizes: dict[str, Resized] = Field(default_factory=dict)
    """by tensor name; tensors that are not named have the shapes that the builder gives them"""
    attributes: tuple[Attribute, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    """other names of a stored tensor, by name: weights that are tied"""
    complete: bool = False
    """whether sizes and attributes are all that the model has, for nobody knows what it was before its edits"""
    inputs: tuple[Input, ...] = ()
    """an example of what the model takes"""
    ledger_head: str | None = None
    """hash of the last entry of the ledger when the model was saved"""
    fingerprint: str
    """SHA-256 of the model's tensors, see `weightfold.artifact.header.fingerprint`"""
    versions: dict[str, str] = Field(default_factory=dict)


def read_structure(path: Path) -> tuple[Structure, Header]:
    """Read how to rebuild a saved model from the metadata of its file.

    Raises:
        ArtifactError: the file is corrupt, was not written by weightfold, or by a newer version.
    """
    header = read_header(path)
    text = header.metadata.get(KEY)
    if text is None:
        raise ArtifactError(
            f"'{path}' holds tensors, but not how to build the model: it was not written by weightfold.",
            remedy="Pass the model together with this file as its weights.",
        )
    return parse_structure(text, str(path)), header


def parse_structure(text: str, where: str) -> Structure:
    """Read a structure from JSON.

    Raises:
        ArtifactError: it is no structure, or a newer one; starts with `where`.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        reason = f"no JSON: {error}"
        raise ArtifactError(
            f"'{where}' holds a damaged structure: {reason}.", remedy="Write the model again."
        ) from None
    if isinstance(content, dict) and type(content.get("format")) is int and content["format"] > FORMAT:
        raise ArtifactError(
            f"'{where}' has format {content['format']}; this version of weightfold reads up to {FORMAT}.",
            remedy="Upgrade weightfold.",
        )
    try:
        return Structure.from_json(text)
    except ConfigError as error:
        raise ArtifactError(
            f"'{where}' holds a damaged structure: {error.message}", remedy="Write the model again."
        ) from None


def to_metadata(structure: Structure) -> dict[str, str]:
    """Give the metadata of a model file."""
    head = {} if structure.ledger_head is None else {HEAD_KEY: structure.ledger_head}
    return {KEY: structure.to_json(), **head}


def check_tensors(structure: Structure, header: Header, path: Path) -> None:
    """Check that the tensors of a file are those that its structure describes.

    Raises:
        ArtifactError: a resized tensor has another shape, or an alias stands for nothing; names it.
    """
    for name, resized in structure.sizes.items():
        stored = header.tensors.get(structure.aliases.get(name, name))
        if stored is None:
            raise ArtifactError(f"'{path}' lacks '{name}', which its structure resizes to {resized.after}.")
        if stored.shape != resized.after:
            raise ArtifactError(
                f"'{name}' in '{path}' has the shape {stored.shape}; its structure says {resized.after}."
            )
    for alias, name in structure.aliases.items():
        if name not in header.tensors:
            raise ArtifactError(f"'{path}' ties '{alias}' to '{name}', which it lacks.")


def differences(
    before: Mapping[str, Shape], after: Mapping[str, Shape], aliases: Mapping[str, str]
) -> dict[str, Resized]:
    """List the tensors whose shapes differ, each under one name only.

    Example:
        >>> differences({"w": (4, 2), "b": (2,)}, {"w": (3, 2), "b": (2,)}, {})
        {'w': Resized(before=(4, 2), after=(3, 2))}
    """
    return {
        name: Resized(before=shape, after=after[name])
        for name, shape in before.items()
        if name in after and name not in aliases and after[name] != shape
    }
