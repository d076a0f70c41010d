"""Save a model with what is needed to rebuild it, and rebuild it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file as load_file_tensors
from safetensors.torch import save
from torch import Tensor, nn

from weightfold import __version__
from weightfold.artifact import Builder, Input, Structure, read_header, read_structure, write_bytes, write_json
from weightfold.artifact.format import KEY, check_tensors, to_metadata
from weightfold.artifact.header import fingerprint, settled
from weightfold.artifact.packed import SUFFIX
from weightfold.blueprint import Blueprint, rebuild_, state_tensors
from weightfold.data.checkpoint import check_names, fitted_names, load_weights_, put_tensors_, read_tensors
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export.bounded import build_named
from weightfold.export.embedded import PROGRAM, program_module
from weightfold.export.reshape import reshape_
from weightfold.fingerprint import fingerprint as model_fingerprint
from weightfold.quant.clustered import KEY as CLUSTERED
from weightfold.quant.clustered import read_clustered
from weightfold.runtime import SUFFIXES, load_file

STRUCTURE_FILE = "structure.json"


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    before: Blueprint | None,
    builder: Builder,
    inputs: Sequence[Input] = (),
    ledger_head: str | None = None,
    program: str | None = None,
) -> Structure:
    """Write a model as one safetensors file, at one stroke.

    Args:
        model: the module to save.
        path: the file, replaced if it exists.
        before: the blueprint of the same module before any edit; None where nobody knows it.
        builder: how that module is made.
        inputs: an example of what the model takes.
        ledger_head: hash of the last entry of the run's ledger.
        program: the model's graph, with which the file can be loaded without the model's class; see `embedded`.
    Returns:
        structure: what the metadata of the file says.
    Raises:
        ArtifactError: the file cannot be written; nothing is left behind.
    """
    structure = structure_of(model, before, builder, inputs, ledger_head)
    tensors = {n: t.detach().cpu().contiguous() for n, t in state_tensors(model).items() if n not in structure.aliases}
    metadata = to_metadata(structure) | ({} if program is None else {PROGRAM: program})
    write_bytes(Path(path), settled(save(tensors, metadata=metadata)))
    return structure


def structure_of(
    model: nn.Module,
    before: Blueprint | None,
    builder: Builder,
    inputs: Sequence[Input] = (),
    ledger_head: str | None = None,
) -> Structure:
    """Take down what must be known besides the tensors to rebuild a module; see `save_model`."""
    now = Blueprint.of(model)
    sizes, attributes = now.as_it_is() if before is None else before.changes_to(now)
    return Structure(
        builder=builder,
        sizes=sizes,
        attributes=attributes,
        complete=before is None,
        aliases=dict(now.aliases),
        inputs=tuple(inputs),
        ledger_head=ledger_head,
        fingerprint=model_fingerprint(model),
        versions={"weightfold": __version__, "torch": str(torch.__version__)},
    )


def write_structure(structure: Structure, folder: Path) -> None:
    """Write `structure.json` beside a saved model."""
    write_json(folder / STRUCTURE_FILE, structure.model_dump(mode="json"))


def load(path: str | Path, model: nn.Module | None = None, example: Any = None) -> Any:
    """Load a model that weightfold saved, with the shapes that it had then, or a file that it exported.

    Args:
        path: `model.safetensors`, a packed file `.wfp`, or the folder of a run that holds one; `.onnx`, `.pt2`, or the
            `.xml` of an OpenVINO IR; with `model` also any file of tensors: a state dict, what `palettize` saved.
        model: for a model that is not built in: an instance as it was made before any edit. It is changed in place, its
            widths too. Without one, a file that was saved with an example input gives its graph as a module.
        example: of the model's input, for a state dict of folded widths that does not say how it is made.
    Returns:
        model: a module on the CPU, in evaluation mode; for `.onnx` and `.xml` a `weightfold.runtime.Loaded`, which runs
            the file in its runtime and is called like the module.
    Raises:
        ArtifactError: the file is missing, corrupt, foreign, or does not fit the model; names tensor and shapes.
        ConfigError: the model is of the user's own class, and none was passed.
        ExportError: the file's runtime is not installed; says the line that installs it.
    Example:
        >>> import tempfile
        >>> from weightfold.models import build, TableInput, Classes
        >>> from weightfold.models import TaskSpec
        >>> task = TaskSpec(input=TableInput(n_features=3), output=Classes(n=2))
        >>> net = build("mlp", task, hidden=(5,))
        >>> builder = Builder(kind="built-in", name="mlp", task=task.model_dump(), overrides={"hidden": (5,)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_model(net, f"{folder}/model.safetensors", before=Blueprint.of(net), builder=builder)
        ...     twin = load(folder)
        >>> torch.equal(twin.head.weight, net.head.weight)
        True
    """
    file = model_file(path)
    if file.suffix in SUFFIXES:
        return load_file(file)
    if file.suffix == SUFFIX:
        from weightfold.export.packed import load_packed

        return load_packed(file, model)
    if model is not None and not is_structured(file):
        load_state_(model, file, example)
        return model.eval()
    return _load_structured(file, model)


def is_structured(file: Path) -> bool:
    """Whether a file says how its model is built; one that is missing or foreign does not."""
    return file.suffix == ".safetensors" and file.is_file() and KEY in read_header(file).metadata


def _load_structured(file: Path, model: nn.Module | None) -> nn.Module:
    structure, header = read_structure(file)
    check_tensors(structure, header, file)
    if fingerprint(file, header, structure.aliases) != structure.fingerprint:
        raise ArtifactError(
            f"The tensors in '{file}' do not have the fingerprint that its metadata gives: they were changed.",
            remedy="Copy or write it again.",
        )
    if model is None and structure.builder.kind != "built-in" and PROGRAM in header.metadata:
        tensors = load_file_tensors(file)
        tensors |= {alias: tensors[name] for alias, name in structure.aliases.items()}
        return program_module(header.metadata[PROGRAM], tensors, str(file))
    made = make(structure.builder, file) if model is None else model
    rebuild_(made, structure, str(file))
    load_weights_(made, file)
    return made.eval()


def load_state_(model: nn.Module, path: str | Path, example: Any = None) -> None:
    """Put a file of tensors into a model, with the widths that they have in the file.

    Args:
        model: as it was made; changed in place.
        path: what `weightfold.data.load_weights_` reads, or a file of clustered tensors.
        example: what `trace` takes, or a list of `Input`, to tell what folded widths mean.
    Raises:
        ArtifactError: the file cannot be read, holds code, or does not fit the model; names the tensor.
    """
    path = Path(path)
    tensors = fitted_names(model.state_dict(), read_state(path))
    check_names(model, tensors, path)
    reshape_(model, tensors, str(path), example)
    put_tensors_(model, tensors, path)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, clustered ones as their values."""
    if path.suffix == ".safetensors" and path.is_file() and CLUSTERED in read_header(path).metadata:
        return read_clustered(path)
    return read_tensors(path)


def model_file(path: str | Path) -> Path:
    """Find the model's file in a run folder, or take the file itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    packed, plain = path / f"model{SUFFIX}", path / "model.safetensors"
    return packed if packed.is_file() and not plain.is_file() else plain


def make(builder: Builder, file: Path) -> nn.Module:
    """Make the module of a file as it was before any edit.

    Raises:
        ConfigError: it is not built in.
        ArtifactError: there is no such network, or it is larger than the file explains.
    """
    if builder.kind == "built-in":
        return build_named(builder, str(file), file.stat().st_size)
    raise not_run(builder, file)


def not_run(builder: Builder, file: Path) -> ConfigError:
    """Say that a file names code, and how to name it oneself."""
    name = builder.name if builder.kind == "function" else f"MODULE:{builder.name}"
    where = "" if builder.kind == "function" else f", where MODULE.py is the file that defines {builder.name}"
    return ConfigError(
        f"'{file}' holds a model made by '{builder.name}': code that is not run because a file names it.",
        remedy=f"If you trust it, pass --model {name}{where}; in Python weightfold.load(path, model), with the model "
        "as it was made before any edit.",
    )
