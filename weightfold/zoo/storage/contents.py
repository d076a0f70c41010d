"""Tensors as bytes and back: in full as a safetensors file, or as a difference to another content of the zoo."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from weightfold.artifact.header import DTYPES, parse_header
from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError
from weightfold.fingerprint import digest as digest_of
from weightfold.zoo.cache import Cache
from weightfold.zoo.storage.catalogue import MAX_DEPTH, Catalogue, Content
from weightfold.zoo.storage.objects import Objects

ALIASES = "aliases"
"""Key of the metadata of a blob: further names of tied tensors, as JSON."""
CACHE_BYTES = 1 << 28
"""Of decoded parents that are kept for their next child."""
_AGAIN = "Add the model again from its source."
KNOWN_DTYPES = frozenset(DTYPES.values())


def to_blob(state: Mapping[str, Tensor]) -> bytes:
    """Write tensors in full; tied ones once. The same tensors give the same bytes.

    Args:
        state: contiguous CPU tensors by name; a tied one is the same object under each name.
    Raises:
        ArtifactError: a tensor has a name or type that safetensors does not know; names it.
    Example:
        >>> import torch
        >>> weight = torch.ones(2)
        >>> twin = from_blob(to_blob({"a": weight, "b": weight, "c": torch.zeros(())}))
        >>> sorted(twin), twin["a"] is twin["b"]
        (['a', 'b', 'c'], True)
    """
    check_tensors(state)
    first: dict[int, str] = {}
    held: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, value in state.items():
        owner = first.setdefault(id(value), name)
        if owner == name:
            held[name] = value
        else:
            aliases[name] = owner
    return save(held, {ALIASES: json.dumps(aliases, sort_keys=True)} if aliases else None)


def check_tensors(state: Mapping[str, Tensor]) -> None:
    """Make sure that a safetensors file can hold tensors.

    Raises:
        ArtifactError: one has a type that it does not know, or a name that is its own or no Unicode; names it.
    Example:
        >>> import torch
        >>> check_tensors({"__metadata__": torch.ones(2)})
        Traceback (most recent call last):
        weightfold.errors.ArtifactError: A safetensors file cannot hold a tensor named '__metadata__'.
          -> Rename it before adding the model.
    """
    for name, value in state.items():
        if name == "__metadata__" or (not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name)):
            raise ArtifactError(
                f"A safetensors file cannot hold a tensor named {name!r}.", remedy="Rename it before adding the model."
            )
        if str(value.dtype).removeprefix("torch.") not in KNOWN_DTYPES:
            raise ArtifactError(
                f"'{name}' has the type {value.dtype}, which a safetensors file cannot hold.",
                remedy="Change its type before adding the model.",
            )


def from_blob(data: bytes) -> dict[str, Tensor]:
    """Read tensors that were written in full, in the order of their names.

    Raises:
        ArtifactError: the bytes are no such file.
    """
    try:
        state = load(data)
        aliases = parse_json(parse_header(data, "a blob").metadata.get(ALIASES, "{}"))
        return dict(sorted((state | {alias: state[name] for alias, name in aliases.items()}).items()))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"The bytes are no tensors: {error}.") from None


def read_extras(data: bytes) -> dict[str, dict[str, str]]:
    """Read what lay beside a model's tensors: the file's metadata and texts, by name.

    Raises:
        ArtifactError: it is something else.
    Example:
        >>> read_extras(b'{"metadata": {"format": "pt"}}')
        {'metadata': {'format': 'pt'}}
    """
    try:
        extras = parse_json(data)
    except ValueError as error:
        raise ArtifactError(f"What lay beside the model is damaged: {error}.", remedy=_AGAIN) from None
    parts = extras.values() if isinstance(extras, dict) else [None]
    if not all(isinstance(part, dict) and all(isinstance(text, str) for text in part.values()) for part in parts):
        raise ArtifactError("What lay beside the model is damaged: it is no table of texts.", remedy=_AGAIN)
    return extras


def describe(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Signature, number of parameters, usual type and size of tensors, each tied one counted once.

    Example:
        >>> import torch
        >>> found = describe({"w": torch.zeros(2, 3), "n": torch.zeros((), dtype=torch.int64)})
        >>> found["n_parameters"], found["dtype"], found["size_bytes"]
        (7, 'float32', 32)
    """
    unique = {id(value): value for value in state.values()}.values()
    facts = [[name, str(state[name].dtype), list(state[name].shape)] for name in sorted(state)]
    sizes: Counter[str] = Counter()
    for value in unique:
        sizes[str(value.dtype).removeprefix("torch.")] += value.numel()
    return {
        "signature": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16],
        "n_parameters": sum(sizes.values()),
        "dtype": sizes.most_common(1)[0][0] if sizes else "none",
        "size_bytes": sum(value.numel() * value.element_size() for value in unique),
    }


class Reader:
    """Reads contents, chains of differences included, and verifies what it gives.

    Others may pack, unpack and remove meanwhile, so that a row is out of date when the row of its base is looked up:
    what fails is tried again as long as the row has changed. Decoded parents are kept by their blob, for two contents
    may decode to equal tensors, and each blob is to be read.
    """

    def __init__(self, catalogue: Catalogue, objects: Objects) -> None:
        self._catalogue, self._objects = catalogue, objects
        self._parents: Cache[str, dict[str, Tensor]] = Cache(CACHE_BYTES, least=1)

    def state(self, content: Content) -> dict[str, Tensor]:
        """The tensors of a content, its own copies. Call it within a lease.

        Raises:
            ArtifactError: a blob is missing or damaged; names blob, model and what to do.
        """
        state = self._decoded(content, MAX_DEPTH)
        return _copied(state) if state is self._parents.get(content.blob) else state

    def decode(self, data: bytes, base: Content | None) -> dict[str, Tensor]:
        """The tensors that bytes stand for, as a difference to a content or in full."""
        if base is None:
            return from_blob(data)
        from weightfold.zoo.delta.codec import decode

        return decode(data, self._parent(base, MAX_DEPTH))

    def _parent(self, base: Content, depth: int) -> dict[str, Tensor]:
        """The tensors of a content, kept for its next child."""
        return self._parents.put(base.blob, self._decoded(base, depth))

    def _decoded(self, content: Content, depth: int) -> dict[str, Tensor]:
        if (held := self._parents.get(content.blob)) is not None:
            return held
        try:
            state = dict(sorted(self._undone(content, depth).items()))
            if digest_of(state) != content.decoded:
                raise ArtifactError(
                    f"The blob '{self._objects.path(content.blob)}' gives other tensors than were stored."
                )
        except ArtifactError as error:
            now = self._catalogue.content(content.digest)
            if now is not None and now != content:
                return _copied(self._decoded(now, depth))
            raise self._explained(error, content) from None
        return state

    def _undone(self, content: Content, depth: int) -> dict[str, Tensor]:
        data = self._objects.read(content.blob)
        if content.base is None:
            return from_blob(data)
        base = self._catalogue.content(content.base)
        if base is None or depth == 0:
            raise ArtifactError(
                f"The content {content.base[:12]} that it is a difference to is gone or goes in a ring."
            )
        from weightfold.zoo.delta.codec import decode

        return decode(data, self._parent(base, depth - 1))

    def _explained(self, error: ArtifactError, content: Content) -> ArtifactError:
        if error.remedy is not None and "zoo verify" in error.remedy:
            return error
        names = self._catalogue.names_of(content.digest)
        whose = f"'{names[0]}'" if names else f"content {content.digest[:12]}"
        return ArtifactError(
            f"{error.message} It holds the model {whose}.",
            remedy=f"Restore that file from a copy, or add {whose} again from its source; "
            "'weightfold zoo verify' lists all that is affected.",
        )


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    copies = {id(value): value.clone() for value in state.values()}
    return {name: copies[id(value)] for name, value in state.items()}
