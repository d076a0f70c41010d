"""What a zoo takes down of a model besides its tensors: symmetries of the architecture, semantic hash, embedding.

Symmetries are found once for an architecture, by tracing it: of a run or an export of weightfold by what the file says,
of a module or a function that the user names by its own code. Tensors alone have none, and the card says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weightfold.artifact import Builder, Input, Structure
from weightfold.artifact.format import KEY
from weightfold.blueprint import Blueprint, find_aliases, rebuild_, state_tensors
from weightfold.errors import ArtifactError, WeightfoldError
from weightfold.export.bounded import build_named
from weightfold.export.embedded import PROGRAM, program_module
from weightfold.export.example import zeros
from weightfold.export.opened import open_model
from weightfold.export.saved import structure_of
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import Example, arguments
from weightfold.runtime.require import quiet
from weightfold.weights.compare import differences, untied_symmetries
from weightfold.weights.symmetry import Symmetries
from weightfold.zoo.exchange.imports import Imported
from weightfold.zoo.find import embed

TENSORS_ONLY = "only tensors are known; say what they belong to: --model SPEC --example SHAPE"
N_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Traced:
    """An architecture as far as it is known.

    Args:
        found: its symmetries, or None.
        reason: why there are none.
        structure: how weightfold rebuilds a model of it; of the first one that was seen.
    """

    found: Symmetries | None
    reason: str | None = None
    structure: Structure | None = None


class Told(NamedTuple):
    """What the tensors of a model say: the semantic hash or why there is none, and the embedding's bytes."""

    semantic_hash: str | None
    reason: str | None
    embedding: bytes | None


class Tracer:
    """Finds symmetries, each architecture's once."""

    def __init__(self) -> None:
        self._seen: dict[object, Traced] = {}
        self._templates: dict[object, tuple[nn.Module, Any, Structure]] = {}

    def trace(
        self, item: Imported, model: str | nn.Module | None = None, example: Example | Sequence[str] | None = None
    ) -> Traced:
        """Find the symmetries of a model that was read.

        Args:
            model: what the tensors belong to: a module, a built-in name, or package.module:function.
            example: of its input: tensors, or texts such as "1x3x32x32".
        Raises:
            ArtifactError: the tensors do not fit the model; says what differs.
            ConfigError: the model cannot be made.
        """
        named = item.module if model is None else model
        built_in = item.structure is not None and item.structure.builder.kind == "built-in"
        return self._by_structure(item) if named is None or built_in else self._by_template(item, named, example)

    def _by_structure(self, item: Imported) -> Traced:
        if item.structure is None:
            return Traced(None, TENSORS_ONLY)
        program = hashlib.sha256(item.metadata.get(PROGRAM, "").encode()).hexdigest()
        key = (_core(item.structure), program)
        if key not in self._seen:
            self._seen[key] = _reasoned(lambda: _rebuilt(item), item.structure)
        return self._seen[key]

    def _by_template(self, item: Imported, model: str | nn.Module, example: Any) -> Traced:
        if isinstance(model, nn.Module) and example is None:
            return Traced(None, "no example of the model's input was passed, which tracing it needs")
        key = (model if isinstance(model, str) else make_of(model), _shape_of(example))
        if key not in self._templates:
            self._templates[key] = _template(model, example)
        module, inputs, structure = self._templates[key]
        edits = item.structure
        if edits is None:
            _check_fit(module, item)
        signature = (key, None if edits is None else _core(edits))
        if signature not in self._seen:
            self._seen[signature] = _reasoned(lambda: (_twin(module, item, edits), inputs), edits or structure)
        return self._seen[signature]


def make_of(module: nn.Module) -> tuple[object, ...]:
    """What a module is made of, apart from its numbers: equal for two that compute the same way with equal tensors.

    Plain settings count by value, anything else (functions, objects) by identity: what is not known to be alike is not.

    Example:
        >>> make_of(nn.Linear(3, 2)) == make_of(nn.Linear(3, 2)), make_of(nn.GELU()) == make_of(nn.GELU("tanh"))
        (True, False)
    """
    parts: list[object] = [(name, tuple(value.shape)) for name, value in state_tensors(module).items()]
    parts.append(tuple(sorted(find_aliases(module).items())))
    for path, inner in module.named_modules(remove_duplicate=False):
        settings = ((k, v) for k, v in vars(inner).items() if not (k.startswith("_") or k == "training"))
        parts.append((path, type(inner), tuple((k, _setting(v)) for k, v in sorted(settings))))
        parts.append(tuple(id(hook) for hook in (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values())))
    return tuple(parts)


def _setting(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return tuple(_setting(item) for item in value)
    return id(value)


def _core(structure: Structure) -> str:
    return structure.model_copy(update={"fingerprint": "", "ledger_head": None, "versions": {}}).to_json()


def _twin(module: nn.Module, item: Imported, edits: Structure | None) -> nn.Module:
    twin = independent_copy(module)
    if edits is not None:
        rebuild_(twin, edits, item.source or item.name)
    return _loaded(twin, item)


def structure_for(item: Imported, traced: Traced) -> Structure | None:
    """How weightfold rebuilds a model: as its file says, or as the architecture that was named."""
    if item.structure is not None or traced.structure is None:
        return item.structure
    return traced.structure.model_copy(update={"fingerprint": item.digest})


def metadata_for(item: Imported, traced: Traced) -> dict[str, str]:
    """The metadata of the file that the zoo writes of a model."""
    structure = structure_for(item, traced)
    return dict(item.metadata) | ({} if structure is None else {KEY: structure.to_json()})


def described(items: Sequence[Imported], traced: Sequence[Traced]) -> list[Told]:
    """The semantic hash of each model, or why there is none, and its embedding; those of one architecture together."""
    told = [Told(None, known.reason, None) for known in traced]
    together: dict[int, list[int]] = {}
    for at, known in enumerate(traced):
        if known.found is None:
            told[at] = Told(None, known.reason, _embedded_alone(items[at].state))
        else:
            together.setdefault(id(known.found), []).append(at)
    for places in together.values():
        found = traced[places[0]].found
        assert found is not None
        texts, reasons, vectors = embed.described(found, [items[at].state for at in places])
        for at, text, reason, vector in zip(places, texts, reasons, vectors, strict=True):
            told[at] = Told(text, reason, vector.tobytes())
    return told


def _embedded_alone(state: Mapping[str, Tensor]) -> bytes | None:
    try:
        return embed.embedding(state).tobytes()
    except WeightfoldError:
        return None


def _reasoned(build: Any, structure: Structure | None) -> Traced:
    """Trace a model; whatever fails is a reason, for the tensors can be kept without."""
    try:
        with quiet():
            model, example = build()
            return Traced(untied_symmetries(model.eval(), example), None, structure)
    except WeightfoldError as error:
        return Traced(None, error.message, structure)
    except Exception as error:  # tracing runs the model's own code
        text = str(error).partition("\n")[0]
        return Traced(None, f"tracing failed: {type(error).__name__}: {text}", structure)


def _rebuilt(item: Imported) -> tuple[nn.Module, Any]:
    structure, where = item.structure, item.source or item.name
    assert structure is not None
    if not structure.inputs:
        raise ArtifactError("the file gives no example of the model's input, which tracing it needs")
    if structure.builder.kind != "built-in":
        if PROGRAM not in item.metadata:
            raise ArtifactError(f"it is made by '{structure.builder.name}', which is not run: pass it as the model")
        model = program_module(item.metadata[PROGRAM], _sound(item.state), where)
        for mode in ("train", "eval"):  # a graph has one mode and refuses these; it computes as in evaluation mode
            vars(model).pop(mode, None)
        return model, zeros(structure.inputs)
    size_bytes = sum(value.nbytes for value in item.state.values())
    model = build_named(structure.builder, where, size_bytes)
    rebuild_(model, structure, where)
    return _loaded(model, item), zeros(structure.inputs)


def _loaded(model: nn.Module, item: Imported) -> nn.Module:
    model.load_state_dict(_sound(item.state), strict=False)
    return model


def _sound(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights to try an architecture with, which counts for all its models: drawn where those at hand are broken."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.1 * torch.randn(value.shape, generator=generator).to(value.dtype) if _is_broken(value) else value
        for name, value in state.items()
    }


def _is_broken(value: Tensor) -> bool:
    """Whether a tensor holds NaN or infinity; minus infinity is what masks are made of."""
    return value.is_floating_point() and not bool((value.float().isfinite() | (value.float() == -torch.inf)).all())


def _template(model: str | nn.Module, example: Any) -> tuple[nn.Module, Any, Structure]:
    """The module that tensors belong to, an example, and how weightfold rebuilds it."""
    if isinstance(model, str):
        texts = [example] if isinstance(example, str) else list(example or ())
        source = open_model(model, example=texts)
        structure = structure_of(source.model, source.before, source.builder, source.inputs)
        return source.model, zeros(source.inputs) if source.inputs else None, structure
    before = Blueprint.of(model)
    builder = Builder(kind="instance", name=f"{type(model).__module__}.{type(model).__qualname__}")
    return model, example, structure_of(model, before, builder, _inputs(example))


def _inputs(example: Any) -> tuple[Input, ...]:
    args, kwargs = arguments(example)
    named = [(None, value) for value in args] + list(kwargs.items())
    return tuple(
        Input(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."))
        for name, value in named
        if isinstance(value, Tensor)
    )


def _shape_of(example: Any) -> str:
    if example is None or isinstance(example, str | list):
        return json.dumps(example)
    return repr(_inputs(example))


def _check_fit(module: nn.Module, item: Imported) -> None:
    own = {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    there = {id(value) for name, value in own.items() if name in item.state}
    own = {
        name: value
        for name, value in own.items()
        if name in item.state or not (name.endswith("num_batches_tracked") or id(value) in there)
    }
    found = differences(own, item.state)
    if found:
        text = "; ".join(found[:N_SHOWN]).replace("the first", "the model").replace("the second", "the file")
        more = f"; and {len(found) - N_SHOWN} more" if len(found) > N_SHOWN else ""
        raise ArtifactError(
            f"'{item.source or item.name}' does not belong to the model that was named: {text}{more}.",
            remedy="Name the model that the weights were trained with, or none.",
        )


def with_architecture(item: Imported, traced: Traced) -> Imported:
    """Name the architecture where the file does not."""
    if item.architecture is None and traced.structure is not None:
        return replace(item, architecture=traced.structure.builder.name)
    return item
