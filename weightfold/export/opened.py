"""Open whatever the user names as a model: a run, a saved model, a built-in name, a function, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weightfold.artifact import Builder, CodedTensor, Input, Structure, read_header, read_structure
from weightfold.artifact.packed import SUFFIX, read_packed
from weightfold.blueprint import Blueprint
from weightfold.data import load_model
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export.embedded import PROGRAM
from weightfold.export.example import parse_input, task_input
from weightfold.export.saved import is_structured, load, load_state_, make, model_file, not_run, read_state
from weightfold.export.source import Source
from weightfold.ledger import Ledger
from weightfold.models import NAMES, Classes, ImageInput, NextToken, TableInput, TaskSpec, TextInput
from weightfold.quant.activations import Grid
from weightfold.runtime import SUFFIXES as RUNTIMES

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_NAMED = f".safetensors or {SUFFIX} and were written by weightfold"


def open_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    example: Sequence[str] = (),
    task: TaskSpec | None = None,
    maker: str | None = None,
) -> Source:
    """Open a model with all that is known of it.

    Args:
        spec: a run's folder, a file that weightfold saved, a built-in name, package.module:function, or a Hugging Face
            folder.
        weights: a file of tensors for the model, or a model that weightfold saved.
        example: inputs as text, see `parse_input`.
        task: of the data that the model is for.
        maker: package.module:function that makes the module of a saved model, in place of what its file names.
    Raises:
        ConfigError: the spec names nothing, or what is needed to make or trace the model is missing.
        ArtifactError: a file is corrupt or does not fit.
    Example:
        >>> source = open_model("lenet5", example=["2x1x8x8"])
        >>> type(source.model).__name__, source.inputs[0].shape
        ('LeNet5', (2, 1, 8, 8))
    """
    inputs = tuple(parse_input(text) for text in example)
    if is_saved(spec):
        if weights is not None:
            raise ConfigError(
                f"'{spec}' brings its own weights; '{weights}' cannot be put in their place.",
                remedy="Leave out the weights, or name what makes the network (built-in, package.module:function).",
            )
        return _open_saved(model_file(spec), inputs, task, maker)
    if weights is not None and is_saved(weights):
        return _open_saved(model_file(weights), inputs, task, spec)
    path = Path(spec)
    if path.is_file():
        raise no_model(path)
    if path.is_dir() and not Path(spec, "config.json").is_file():
        raise ArtifactError(
            f"The folder '{spec}' holds neither a run (model.safetensors) nor a Hugging Face model (config.json).",
            remedy=f"A run that was interrupted has no model yet: go on with weightfold train --resume {spec}",
        )
    task = task or (_task_for(spec, inputs) if spec in NAMES else None)
    builder = _builder(spec, task)
    if weights is None or path.is_dir():
        model = load_model(spec, weights, task=task).eval()
        fresh = None if builder.kind == "built-in" else lambda: load_model(spec, task=task)
        return Source(model, inputs or _inputs_of(model, task), Blueprint.of(model), builder, fresh=fresh)
    model = load_model(spec, task=task)
    before, inputs = Blueprint.of(model), inputs or _inputs_of(model, task)
    load_state_(model, weights, inputs)
    return Source(model.eval(), inputs, before, builder, fresh=lambda: load_model(spec, task=task))


def is_saved(spec: str | Path) -> bool:
    """Tell whether a path is a model that weightfold saved, or the folder of one."""
    path = Path(spec)
    if path.is_dir():
        return model_file(path).is_file() and not (path / "config.json").is_file()
    if path.suffix == SUFFIX:
        return path.is_file()
    return is_structured(path)


def needs_maker(spec: str | Path) -> bool:
    """Tell whether a path is a saved model that only code of the user's own makes."""
    return is_saved(spec) and _structure_of(model_file(spec)).builder.kind != "built-in"


def no_model(path: Path) -> ArtifactError:
    """Say what a file is that was named as a model and is none."""
    if path.suffix in RUNTIMES:
        return ArtifactError(
            f"'{path}' was written for a runtime; nothing is made of it but answers.",
            remedy="Name the model that it was exported from. weightfold.load(path) runs the file in Python.",
        )
    if path.suffix in ENDINGS:
        try:
            n = len(read_state(path))
        except ArtifactError as error:
            return error
        return ArtifactError(
            f"'{path}' holds {n} tensors, but not how to build the model that they belong to.",
            remedy=f"Name that model, and this file as its weights: package.module:function --weights {path}",
        )
    return ArtifactError(
        f"'{path}' is a file, but no model.", remedy=f"Models are folders of runs and files that end in {_NAMED}."
    )


def _structure_of(path: Path) -> Structure:
    return read_packed(path).structure if path.suffix == SUFFIX else read_structure(path)[0]


def _open_saved(path: Path, inputs: tuple[Input, ...], task: TaskSpec | None, maker: str | None) -> Source:
    """Open a saved model; with a maker, make its module by that instead of by what the file names."""
    structure = _structure_of(path)
    builder, found = structure.builder, inputs or structure.inputs
    if maker is None and builder.kind != "built-in":
        return _open_graph(path, structure, found)

    def fresh() -> nn.Module:
        if builder.kind == "built-in" and maker in (None, builder.name):
            return make(builder, path)
        assert maker is not None
        if maker in NAMES:
            return load_model(maker, task=task or _task_for(maker, found))
        return load_model(maker, task=task)

    original = fresh()
    if maker is not None:
        _check_same(original, builder, maker, path)
    before = Blueprint.of(original)
    try:
        model = load(path, original)
    except ArtifactError as error:
        if maker is None:
            raise
        raise ArtifactError(f"'{path}' holds '{builder.name}', not '{maker}': {error.message}") from None
    coded = _codes_of(path, structure)
    grids = _grids_of(path) if coded else {}
    return Source(model, found, before, builder, structure.ledger_head, fresh, coded=coded, grids=grids)


def _open_graph(path: Path, structure: Structure, inputs: tuple[Input, ...]) -> Source:
    """Open a saved model of the user's own class by the graph in its file.

    Raises:
        ConfigError: there is none.
    """
    if path.suffix == SUFFIX or PROGRAM not in read_header(path).metadata:
        raise not_run(structure.builder, path)
    model = load(path)
    return Source(model, inputs, Blueprint.of(model), structure.builder, structure.ledger_head)


def _check_same(made: nn.Module, builder: Builder, maker: str, path: Path) -> None:
    """Refuse to put the weights of one network into another.

    Raises:
        ConfigError: names both.
    """
    if builder.kind == "built-in":
        if maker in NAMES and maker != builder.name:
            raise _another(path, builder.name, maker)
        saved = type(make(builder, path)).__name__
    elif builder.kind == "instance":
        saved = builder.name.rpartition(".")[2]
    else:
        return
    if type(made).__name__ != saved:
        raise _another(path, builder.name, maker)


def _another(path: Path, saved: str, named: str) -> ConfigError:
    named_as = saved if saved in NAMES else f"the code that makes '{saved}' (package.module:function)"
    return ConfigError(
        f"'{path}' holds the weights of '{saved}', not of '{named}'.", remedy=f"Name {named_as}, or pass other weights."
    )


def _codes_of(path: Path, structure: Structure) -> Mapping[str, CodedTensor]:
    """The codes of a saved model: its own, or those of the packed file beside it, of the same moment."""
    file = path.with_suffix(SUFFIX)
    if not file.is_file() or (file != path and structure.ledger_head is None):
        return {}
    packed = read_packed(file)
    return packed.coded if packed.structure.ledger_head == structure.ledger_head else {}


def _grids_of(path: Path) -> Mapping[str, Grid]:
    """The learned grids of what layers read, from the ledger of the run beside a saved model."""
    file = path.with_name("ledger.db")
    if not file.is_file():
        return {}
    with Ledger.open(file, readonly=True) as ledger:
        found = [entry.body["inputs"] for entry in ledger.entries(kind="precision") if "inputs" in entry.body]
    return {name: Grid(*values) for name, values in found[-1].items()} if found else {}


def _builder(spec: str, task: TaskSpec | None) -> Builder:
    if spec in NAMES and task is not None:
        return Builder(kind="built-in", name=spec, task=task.model_dump(mode="json"))
    return Builder(kind="folder" if Path(spec).is_dir() else "function", name=spec)


def _inputs_of(model: nn.Module, task: TaskSpec | None) -> tuple[Input, ...]:
    """Find an example without being told: from the task, or from what Hugging Face models bring."""
    if task is not None:
        return (task_input(task),)
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") == "pixel_values" and hasattr(config, "image_size"):
        size, channels = getattr(config, "image_size", 0), getattr(config, "num_channels", 3)
        return (Input(name="pixel_values", shape=(1, channels, size, size)),) if type(size) is int else ()
    dummies: Any = getattr(model, "dummy_inputs", None)
    if not isinstance(dummies, dict):
        return ()
    high = getattr(config, "vocab_size", None)
    return tuple(
        Input(name=name, shape=tuple(value.shape), dtype=str(value.dtype).removeprefix("torch."), high=high)
        for name, value in dummies.items()
        if isinstance(value, Tensor)
    )


def _task_for(name: str, inputs: Sequence[Input]) -> TaskSpec:
    """Guess the task of a built-in network from the shape of its example; scikit-learn's digits without one.

    Raises:
        ConfigError: no built-in network reads such an input.
    """
    if not inputs:
        if name in ("char-gpt", "gru"):
            return _text_task(name, vocab=96, context=128)
        return TaskSpec(input=ImageInput(channels=1, height=8, width=8), output=Classes(n=10))
    first = inputs[0]
    if len(inputs) == 1 and len(first.shape) == 4:
        _, channels, height, width = first.shape
        return TaskSpec(input=ImageInput(channels=channels, height=height, width=width), output=Classes(n=10))
    if len(inputs) == 1 and len(first.shape) == 2:
        if first.dtype.startswith("int"):
            return _text_task(name, vocab=first.high or 96, context=first.shape[1])
        return TaskSpec(input=TableInput(n_features=first.shape[1]), output=Classes(n=2))
    raise ConfigError(
        f"The example of the built-in model '{name}' must be one input of 4 dimensions (images) or 2 (tables, tokens).",
        remedy="For example --example 1x3x32x32, --example 1x16, or --example 1x128:int64.",
    )


def _text_task(name: str, vocab: int, context: int) -> TaskSpec:
    output = NextToken(vocab=vocab) if name == "char-gpt" else Classes(n=2)
    return TaskSpec(input=TextInput(vocab=vocab, context=context), output=output)
