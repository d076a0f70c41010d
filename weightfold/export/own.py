"""A network of one's own in one line: to a file that `load` gives back, and to files of other runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from weightfold.artifact import Builder, Input, drafting, make_folder
from weightfold.blueprint import Blueprint, describe, origin_of
from weightfold.config import nearest
from weightfold.errors import ConfigError, ExportError
from weightfold.export.check import Exported
from weightfold.export.embedded import program_text
from weightfold.export.saved import save_model
from weightfold.export.source import Source
from weightfold.export.target_safetensors import verify
from weightfold.export.targets import export
from weightfold.graph.copies import independent_copy
from weightfold.graph.trace import arguments
from weightfold.ranks import unwrapped

BY_ENDING = {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino", ".safetensors": "safetensors"}


def save(model: nn.Module, path: str | Path, example: Any = None, *, original: nn.Module | None = None) -> Path:
    """Save a network of any class, folded or not, as one file that `weightfold.load` gives back.

    With an example input the network's graph goes into the file, and it is loaded without the class; else
    `load(path, MyNet())` rebuilds it. What a compressor has worked on needs neither example nor original.

    Args:
        model: a module; also compiled or wrapped for several processes. It is left as it was.
        path: the file, replaced if it exists; its name ends in ".safetensors".
        example: what `weightfold.trace` takes.
        original: the network as it was made, before any edit; its weights do not matter. `load` then refuses others.
    Returns:
        path: of the file.
    Raises:
        ConfigError: the name has another ending.
        ExportError: the file, loaded back, computes something else.
        ArtifactError: the file cannot be written; an older one of that name stays.
    Example:
        >>> import tempfile, torch, weightfold
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = save(net, f"{folder}/net.safetensors", torch.zeros(1, 3))
        ...     twin, graph = weightfold.load(file, nn.Sequential(nn.Linear(3, 2), nn.Tanh())), weightfold.load(file)
        >>> x = torch.ones(1, 3)
        >>> torch.equal(twin(x), net(x)), torch.allclose(graph.eval()(x), net(x))
        (True, True)
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        ending = f" A file for a runtime is written by weightfold.export(model, '{path}')." * (path.suffix in BY_ENDING)
        raise ConfigError(f"A saved network's name must end in '.safetensors'. Got '{path}' instead.{ending}")
    with _at_rest(model) as plain:
        source = source_of(plain, example, original=original, known=model)
        known = original is not None or origin_of(unwrapped(model)) is not None
        program = program_text(source)
        make_folder(path.parent)
        with drafting(path) as draft:
            save_model(
                plain,
                draft,
                before=source.before if known else None,
                builder=source.builder,
                inputs=source.inputs,
                program=program,
            )
            if program is not None:
                verify(source, draft)
    return path


def export_network(
    model: nn.Module,
    path: str | Path,
    example: Any = None,
    *,
    target: str | None = None,
    calibration: Iterable[Any] | Literal["drawn"] = (),
    tolerance: float | None = None,
    prefer: str | None = None,
) -> Exported:
    """Write a network of any class for a runtime, load it back there, and compare; this is `weightfold.export`.

    Args:
        model: a module; it is left as it was.
        path: the file, replaced if it exists.
        example: what `weightfold.trace` takes; what a compressor has worked on needs none.
        target: of `weightfold.export.TARGETS`; by default what the name's ending says: .onnx, .pt2, .xml (OpenVINO).
        calibration: batches of real inputs as the model takes them, for ranges of 8 bits and for the comparison; by
            default the inputs of the probe of the compressor that has worked on it; "drawn" for random numbers.
        tolerance: allowed difference of the outputs; by default the target's own.
        prefer: for "onnx-int8": "speed", by default, or "size".
    Returns:
        exported: sizes, and how well the outputs agree.
    Raises:
        ConfigError: the ending is that of no target.
        ExportError: there is no example, the target cannot express the network, or the file computes something else.
    """
    path = Path(path)
    if target is None and path.suffix not in BY_ENDING:
        raise ConfigError(
            f"The ending of '{path}' is that of no target.", remedy=nearest(path.suffix, BY_ENDING) or "Pass target=."
        )
    with _at_rest(model) as plain:
        drawn = isinstance(calibration, str)
        batches = calibration if drawn else [_cpu(arguments(batch)) for batch in calibration]
        source = source_of(plain, example, known=model, calibration=batches)
        if not source.inputs:
            raise ExportError(
                "What the network takes is not known.",
                remedy="Pass an example input of tensors: weightfold.export(model, path, example).",
            )
        return export(source, target or BY_ENDING[path.suffix], path, tolerance=tolerance, prefer=prefer)


def source_of(
    plain: nn.Module,
    example: Any = None,
    *,
    original: nn.Module | None = None,
    known: nn.Module | None = None,
    calibration: Any = (),
) -> Source:
    """Gather what is known of a network: what is told, else what a compressor took down of ``known``."""
    origin = origin_of(unwrapped(plain if known is None else known))
    inputs: tuple[Input, ...] = () if origin is None else origin.inputs
    if example is not None:
        inputs = describe(example)
    before = origin.before if origin is not None else None
    if original is not None:
        before = Blueprint.of(original)
    builder = Builder(kind="instance", name=type(plain).__name__)
    if not calibration and origin is not None:
        calibration = [_cpu(arguments(batch)) for batch in origin.probe if _alike(describe(batch), inputs)]
    return Source(plain, inputs, before or Blueprint.of(plain), builder, calibration=calibration)


def _alike(batch: tuple[Input, ...], inputs: tuple[Input, ...]) -> bool:
    """Whether a batch differs from the example in its first size alone: so a file takes it."""
    return [(item.name, item.shape[1:], item.dtype) for item in batch] == [
        (item.name, item.shape[1:], item.dtype) for item in inputs
    ]


def _cpu(values: Any) -> Any:
    return tree_map(lambda value: value.detach().cpu() if isinstance(value, Tensor) else value, values)


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[nn.Module]:
    """The plain module on the CPU and in evaluation mode, for a while; a copy where it lives elsewhere."""
    plain = unwrapped(model)
    tensors: list[Tensor] = [*plain.parameters(), *plain.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        yield independent_copy(plain).cpu().eval()
        return
    modes = {module: module.training for module in plain.modules()}
    plain.eval()
    try:
        yield plain
    finally:
        for module, mode in modes.items():
            module.training = mode
