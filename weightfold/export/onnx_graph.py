"""A module as an ONNX graph, and what the targets that change it find there: weights, and the codes behind them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from weightfold.artifact import CodedTensor, step_value
from weightfold.errors import ExportError
from weightfold.export.program import to_program
from weightfold.export.source import Source
from weightfold.runtime.require import quiet, require

Array = npt.NDArray[Any]

OPSET = 21
"""The newest that ONNX Runtime optimises and quantises whole, QDQ of 4 bits included."""

NEEDS = ("onnx", "onnxscript", "onnxruntime")
SAME = 1e-5
"""Share of a row's largest weight by which a weight may differ from code times step: what folding a norm rounds."""

_OPERATOR = re.compile(r"op='([\w.]+)'")
_DOUBLE = (torch.float64, torch.complex64, torch.complex128)


def to_onnx(source: Source) -> Any:
    """Make an ONNX model of a module, weights inside; norms behind convolutions are folded into them.

    Returns:
        model: an `onnx.ModelProto`.
    Raises:
        ExportError: a package is missing, or an operator has no counterpart in ONNX; names it, and the nearest target.
    """
    for name in NEEDS:
        require(name)
    for name, tensor in source.model.state_dict().items():
        if tensor.dtype in _DOUBLE:
            raise ExportError(
                f"'{name}' is of type {tensor.dtype}, for which ONNX Runtime has few kernels.",
                remedy="Convert the model with model.float(), or export it as pt2, the nearest target that can.",
            )
    program = to_program(source)
    try:
        with quiet():
            made = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=OPSET)
            assert made is not None
            return _bare(made.model_proto)
    except OSError:
        raise
    except Exception as error:
        raise _unable(error) from error


def _bare(model: Any) -> Any:
    """Take off where each node came from: paths of the machine, and bytes that a small network feels."""
    for item in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for function in (*model.graph.input, *model.graph.output):
        del function.metadata_props[:]
    return model


def _unable(error: Exception) -> ExportError:
    """Name the operators that ONNX lacks."""
    chain, texts = error, []
    while chain is not None:
        texts.append(str(chain))
        chain = chain.__cause__  # type: ignore[assignment]
    text = "\n".join(texts)
    at = text.find("No ONNX function found")
    names = list(dict.fromkeys(_OPERATOR.findall(text[at : at + 400] if at >= 0 else "")))[:3]
    remedy = "Export it as pt2, the nearest target that can; or write the operator by others."
    if names:
        return ExportError(f"ONNX has no counterpart for the operator '{names[0]}' of this model.", remedy=remedy)
    return ExportError(
        f"The model cannot be expressed in ONNX: {type(error).__name__}: {text.strip().splitlines()[0][:300]}",
        remedy=remedy,
    )


def save_onnx(model: Any, path: Path) -> None:
    """Write an ONNX model, weights inside."""
    path.write_bytes(model.SerializeToString())


def constants(model: Any) -> dict[str, Any]:
    """The stored tensors of a model, by name."""
    return {item.name: item for item in model.graph.initializer}


def float_bytes(model: Any) -> dict[str, int]:
    """Bytes of the stored tensors of floats, by the kind of the first operator that reads each; the largest kinds."""
    kinds = (1, 10, 11, 16)
    held = {n: t for n, t in constants(model).items() if t.data_type in kinds and len(t.dims) > 1}
    found: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            tensor = held.pop(name, None)
            if tensor is not None:
                found[node.op_type] = found.get(node.op_type, 0) + len(tensor.raw_data or tensor.SerializeToString())
    return found


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored matrix or kernel that a node multiplies by.

    Args:
        node: the Conv, Gemm or MatMul.
        name: of the tensor in the graph.
        value: the tensor.
        axis: dimension of its output channels.
    """

    node: Any
    name: str
    value: Array
    axis: int

    @property
    def matrix_OI(self) -> Array:
        """One row for each output channel, shape (O, I)."""
        return np.moveaxis(self.value, self.axis, 0).reshape(self.value.shape[self.axis], -1)


def weights(model: Any) -> Iterator[Weight]:
    """Find every stored matrix or kernel that a Conv, Gemm or MatMul multiplies by; one that serves twice, twice."""
    to_array = require("onnx.numpy_helper").to_array
    stored = constants(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2 or node.input[1] not in stored:
            continue
        value = to_array(stored[node.input[1]])
        if value.ndim < 2 or value.dtype != np.float32 or (node.op_type == "MatMul" and value.ndim != 2):
            continue
        transposed = any(item.name == "transB" and item.i for item in node.attribute)
        yield Weight(node, node.input[1], value, 0 if node.op_type == "Conv" or transposed else 1)


@dataclass(frozen=True, eq=False)
class Codes:
    """The whole numbers behind a weight of a graph.

    Args:
        name: of the tensor in the module.
        codes_OI: shape (O, I), int64.
        scale_O: value of a code, positive, shape (O,), float32.
    """

    name: str
    codes_OI: npt.NDArray[np.int64]
    scale_O: npt.NDArray[np.float32]


def codes_behind(weight: Weight, coded: Mapping[str, CodedTensor]) -> Codes | None:
    """Find the codes of which a weight of the graph is a multiple, row by row: a folded norm scales rows.

    Args:
        coded: tensors of the module, by name; a weight of that name is looked at first.
    """
    rows_OI = weight.matrix_OI.astype(np.float64)
    named = [name for name in coded if name == weight.name] or list(coded)
    for name in named:
        found = _as_multiple(rows_OI, coded[name])
        if found is not None:
            return Codes(name, *found)
    return None


def _as_multiple(rows_OI: Array, tensor: CodedTensor) -> tuple[Array, Array] | None:
    codes_OI = tensor.codes.reshape(tensor.shape[0], -1).astype(np.int64) if tensor.codes.ndim > 1 else None
    if codes_OI is None or codes_OI.shape != rows_OI.shape or not codes_OI.any():
        return None
    at = np.abs(codes_OI).argmax(1)
    top = np.take_along_axis(codes_OI, at[:, None], 1)[:, 0]
    steps = np.broadcast_to(step_value(tensor.steps).astype(np.float64), len(top))
    largest = np.take_along_axis(rows_OI, at[:, None], 1)[:, 0]
    scale_O = np.where(top != 0, largest / np.where(top != 0, top, 1), steps)
    limit = SAME * np.maximum(np.abs(rows_OI).max(1, keepdims=True), 1e-30)
    if not (np.abs(codes_OI * scale_O[:, None] - rows_OI) <= limit).all():
        return None
    sign = np.where(scale_O < 0, -1, 1)
    scale_O = np.where(scale_O == 0, steps, np.abs(scale_O))
    return codes_OI * sign[:, None], scale_O.astype(np.float32)
