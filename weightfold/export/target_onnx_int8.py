"""Target `onnx-int8`: ONNX with weights and activations of 8 bits, as quantise and dequantise nodes (QDQ).

Weights have one scale for each output channel. Where a network has learned codes, they are the file's whole numbers and
their steps its scales: nothing is rounded again, and a folded norm only scales rows. Learned grids of layers' inputs
become the activations' scales; a grid narrower than 8 bits is cut off where it ends. All other ranges are calibrated:
the least and largest values on real inputs. On drawn numbers they are those of nothing, so these are taken only where
they are asked for by name.

Narrow convolutions, and operators that have no kernel of 8 bits, can make a file of 8 bits slower than one of floats.
So, unless size is preferred, files that leave some of it in floats are written too, all are timed in turns on the
example, and the largest share in 8 bits that is hardly slower than the quickest is kept.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from weightfold.errors import ExportError
from weightfold.export.check import Exported, in_batches, verified
from weightfold.export.example import Arguments, draw
from weightfold.export.onnx_graph import (
    Codes,
    Weight,
    codes_behind,
    constants,
    float_bytes,
    save_onnx,
    to_onnx,
    weights,
)
from weightfold.export.source import Source
from weightfold.quant.activations import Grid
from weightfold.runtime.onnx_runtime import load_onnx
from weightfold.runtime.require import quiet, require

SUFFIX = ".onnx"
PREFERENCES = ("speed", "size")
IN_SINGLE = True
RELATIVE = 0.15
"""Allowed error of the outputs, as a share of their norm."""
NARROW = 12
"""Channels below which a convolution of 8 bits may not pay."""
ROUNDS = 20
HARDLY = 1.05
"""How many times as long as the quickest file a smaller one may take."""
HARDLY_SMALLER = 0.6
"""Share of the file in floats beyond which it is said what stays float."""
N_DRAWN, DRAWN = 4, 32
"""Batches that are drawn where drawn inputs are asked for, and samples in each."""
PRODUCTS = ("Conv", "Gemm", "MatMul")
_MOVES = ("Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "MaxPool", "Pad", "Relu", "Reshape", "Slice")
_DELICATE = ("LayerNormalization", "Softmax", "RMSNormalization", "GRU", "LSTM")
"""Operators beside which sums stay in fp32: these need them finer than 8 bits."""


def write(source: Source, path: Path, *, prefer: str = "speed") -> list[str]:
    """Write the file.

    Args:
        prefer: "speed" leaves in floats what is slower in 8 bits, "size" nothing that can be in 8 bits.
    Returns:
        notes: what stays float, where the file is hardly smaller for it.
    Raises:
        ExportError: there are no inputs to calibrate on, nothing to quantise, or the operators cannot be quantised.
    """
    _check_calibration(source)
    model = to_onnx(source)
    found = list(weights(model))
    if not found:
        raise ExportError(
            f"There is nothing to quantise: 8 bits are for convolutions and for products with a stored matrix; "
            f"{_other_operators(model)}.",
            remedy="Export it as onnx, the nearest target that can.",
        )
    coded = {w.name: codes for w in found if (codes := codes_behind(w, source.coded)) is not None}
    overrides = {w.name: _channels(coded[w.name], w) for w in found if w.name in coded and _fits(coded[w.name])}
    overrides |= _grids(model, found, coded, source)
    inputs = _inputs(source, model)
    choices = _left_out(found) if prefer == "speed" else [[]]
    whole = model.ByteSize()
    with tempfile.TemporaryDirectory() as folder:
        made = [Path(folder, f"{number}.onnx") for number in range(len(choices))]
        for file, left in zip(made, choices, strict=True):
            _quantise(model, found, overrides, inputs, file, left)
        seconds = _seconds(made, inputs[0])
        at = _quickest(seconds)
        shutil.copyfile(made[at], path)
        other = f"{made[0].stat().st_size:,} bytes and {seconds[0] / seconds[at]:.2g} times as long" if at else ""
    return _remark(path, whole, other)


def _check_calibration(source: Source) -> None:
    if not source.real and source.calibration != "drawn":
        raise ExportError(
            "There are no real inputs to calibrate on: 8 bits need to know how large the values in the network become.",
            remedy="Pass some: calibration=[batch, ...], on the command line --data PATH. Or ask for random numbers by "
            'name, for a file whose speed alone counts: calibration="drawn", on the command line --calibrate drawn.',
        )


def _other_operators(model: Any) -> str:
    kinds = sorted({node.op_type for node in model.graph.node})
    return f"this model has {', '.join(kinds[:6]) or 'no operator'}{' and others' if len(kinds) > 6 else ''}"


def _remark(path: Path, whole: int, other: str) -> list[str]:
    """What keeps a file large, in words, where it is hardly smaller than the one in floats.

    Args:
        whole: bytes of the file in floats.
        other: what the file takes that leaves nothing in floats, where another is quicker.
    """
    size = path.stat().st_size
    if size <= HARDLY_SMALLER * whole:
        return []
    floats = float_bytes(require("onnx").load(path))
    parts = ", ".join(f"{n:,} in {kind}" for kind, n in sorted(floats.items(), key=lambda item: -item[1]))
    total = sum(floats.values())
    why = f"{total:,} bytes of weights stay float ({parts})" if total else "hardly any of it is weights"
    less = f'; prefer="size" (--prefer size) takes {other}' if other else ""
    return [f"hardly smaller than in floats: {size:,} of {whole:,} bytes, for {why}{less}"]


def _left_out(found: list[Weight]) -> list[list[str]]:
    """Nodes to leave in floats: none, narrow convolutions, all convolutions; each choice once."""
    convs = [w for w in found if w.node.op_type == "Conv"]
    narrow = [w.node.name for w in convs if min(w.value.shape[0], w.value.shape[1]) < NARROW]
    every = [w.node.name for w in convs] if len(convs) < len(found) else narrow
    choices: list[list[str]] = []
    for choice in ([], narrow, every):
        if choice not in choices:
            choices.append(choice)
    return choices if len(narrow) < len(found) else choices[:1]


def _seconds(made: list[Path], inputs: dict[str, Any]) -> list[float]:
    """How long each file takes on one thread, in turns; the least of some rounds."""
    best = [math.inf] * len(made)
    if len(made) == 1:
        return best
    runs = [load_onnx(file, threads=1) for file in made]
    values = [inputs[slot.name] for slot in runs[0].slots]
    for _ in range(ROUNDS):
        for at, loaded in enumerate(runs):
            start = time.perf_counter()
            loaded.run(values)
            best[at] = min(best[at], time.perf_counter() - start)
    return best


def _quickest(seconds: list[float]) -> int:
    """The first file that is hardly slower than the quickest one.

    Example:
        >>> _quickest([1.04, 1.0, 2.0]), _quickest([1.2, 1.0, 1.0])
        (0, 1)
    """
    return next(at for at, took in enumerate(seconds) if took <= HARDLY * min(seconds))


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in ONNX Runtime and compare with the module, its learned grids on."""
    allowed = RELATIVE if tolerance is None else tolerance
    return verified(source, load_onnx(path), "onnx-int8", rms=allowed, grids=source.grids)


def _quantise(
    model: Any, found: list[Weight], overrides: dict[str, Any], inputs: list[Any], path: Path, left: list[str]
) -> None:
    quantization = require("onnxruntime.quantization")
    plain = {w.node.output[0] for w in found}
    products = [n.name for n in model.graph.node if n.op_type == "MatMul" and n.output[0] not in plain]
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder, "model.onnx")
        save_onnx(model, file)
        try:
            quantization.quantize_static(
                str(file),
                str(path),
                _reader(quantization, inputs),
                op_types_to_quantize=_operators(model),
                nodes_to_exclude=[*products, *left],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={"TensorQuantOverrides": overrides, "WeightSymmetric": True},
            )
        except OSError:
            raise
        except Exception as error:  # the tool raises classes of its own
            text = str(error).strip().partition("\n")[0][:300]
            raise ExportError(
                f"ONNX Runtime's quantiser fails on this model: {type(error).__name__}: {text}",
                remedy="Export it as onnx, the nearest target that can.",
            ) from error


def _operators(model: Any) -> list[str]:
    """What is quantised: products, and what lies between them, unless that needs to be finer."""
    kinds = Counter(node.op_type for node in model.graph.node)
    return [*PRODUCTS] if any(kinds[name] for name in _DELICATE) else [*PRODUCTS, *_MOVES]


def _inputs(source: Source, model: Any) -> list[dict[str, Any]]:
    """What ranges are calibrated on, named as the graph names it."""
    names = [item.name for item in model.graph.input]
    fixed = [item.type.tensor_type.shape.dim for item in model.graph.input]
    any_batch = all(not dims[0].HasField("dim_value") for dims in fixed if len(dims))
    size = None if any_batch else source.inputs[0].shape[0]
    given = in_batches(source.real, size)
    if source.real and not given:
        raise ExportError(
            f"The file takes batches of {size} alone, as the example has them; all to calibrate on are shorter.",
            remedy=f"Pass batches of {size} samples or more, or an example with fewer.",
        )
    given = given or [draw(source.inputs, seed=seed, batch=size or DRAWN) for seed in range(N_DRAWN)]
    return [_named(names, arguments) for arguments in given]


def _named(names: list[str], arguments: Arguments) -> dict[str, Any]:
    args, named = arguments
    free = [name for name in names if name not in named]
    return {k: v.numpy() for k, v in (*zip(free, args, strict=False), *named.items())}


def _reader(quantization: Any, inputs: list[dict[str, Any]]) -> Any:
    class Reader(quantization.CalibrationDataReader):
        left: Iterator[dict[str, Any]] = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    return Reader()


# learned codes and grids ----------------------------------------------------------------------------------------------


def _fits(codes: Codes) -> bool:
    return int(np.abs(codes.codes_OI).max()) <= 127


def _channels(codes: Codes, weight: Weight) -> list[dict[str, Any]]:
    """The scale of each output channel, as ONNX Runtime's quantiser takes it."""
    kind = require("onnxruntime.quantization").QuantType.QInt8
    made = [{"quant_type": kind, "scale": np.array(s), "zero_point": np.array(0, np.int8)} for s in codes.scale_O]
    made[0]["axis"] = weight.axis
    return made


def _grids(model: Any, found: list[Weight], coded: dict[str, Codes], source: Source) -> dict[str, Any]:
    """Put the learned grids on what layers read; return the scales of those tensors."""
    onnx, kind = require("onnx"), require("onnxruntime.quantization").QuantType.QUInt8
    overrides: dict[str, Any] = {}
    for weight in found:
        name = coded[weight.name].name if weight.name in coded else weight.name
        grid = source.grids.get(name.rpartition(".")[0])
        if grid is None:
            continue
        tensor = _cut_off(onnx, model, weight, grid)
        zero = np.array(128 if grid.signed else 0, np.uint8)
        overrides[tensor] = [{"quant_type": kind, "scale": np.array(grid.step, np.float32), "zero_point": zero}]
    return overrides


def _cut_off(onnx: Any, model: Any, weight: Weight, grid: Grid) -> str:
    """Bound what a layer reads by the ends of its grid; return the name of that tensor."""
    low, high = (np.float32(end * grid.step) for end in grid.limits)
    read, name = weight.node.input[0], f"{weight.node.output[0]}_grid"
    stored = constants(model)
    for end, value in (("low", low), ("high", high)):
        if f"{name}_{end}" not in stored:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), f"{name}_{end}"))
    clip = onnx.helper.make_node("Clip", [read, f"{name}_low", f"{name}_high"], [name], name=f"{name}_clip")
    weight.node.input[0] = name
    at = next(i for i, node in enumerate(model.graph.node) if node.output[0] == weight.node.output[0])
    model.graph.node.insert(at, clip)
    return name
