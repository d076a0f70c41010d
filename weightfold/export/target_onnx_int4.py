"""Target `onnx-int4`: ONNX with matrices of 4 bits (fewer or more where learned codes need it), by `MatMulNBits`.

Convolutions and everything else stay in fp32: ONNX Runtime has no kernels for them below 8 bits. A matrix that serves
a `Gemm` becomes a `MatMulNBits` and an `Add`: the runtime passes over a `Gemm` without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from weightfold.errors import ExportError
from weightfold.export import nbits
from weightfold.export.check import Exported, verified
from weightfold.export.onnx_graph import Codes, Weight, codes_behind, constants, save_onnx, to_onnx, weights
from weightfold.export.source import Source
from weightfold.runtime.onnx_runtime import load_onnx
from weightfold.runtime.require import require

SUFFIX = ".onnx"
IN_SINGLE = True
BITS = 4
RELATIVE = 0.3
"""Allowed error of the outputs, as a share of their norm."""
LEAST = 1024
"""Weights below which a matrix stays as it is."""


def write(source: Source, path: Path, *, bits: int = BITS) -> None:
    """Write the file.

    Raises:
        ExportError: the model has no matrix to narrow.
    """
    model = to_onnx(source)
    nearest = "onnx-int8, the nearest target that narrows convolutions too" if any(weights(model)) else "onnx"
    if narrow_(model, source, bits) == 0:
        raise ExportError(
            f"No matrix of this model can be held in {bits} bits: it has no product with a stored matrix of {LEAST:,} "
            "weights or more, as a Linear becomes.",
            remedy=f"Export it as {nearest}.",
        )
    save_onnx(model, path)


def verify(source: Source, path: Path, tolerance: float | None = None) -> Exported:
    """Run the file in ONNX Runtime and compare."""
    return verified(source, load_onnx(path), "onnx-int4", rms=RELATIVE if tolerance is None else tolerance)


def narrow_(model: Any, source: Source, bits: int) -> int:
    """Put `MatMulNBits` in the place of every Gemm and MatMul with a stored matrix; return how many were found."""
    onnx = require("onnx")
    found = [w for w in weights(model) if w.node.op_type != "Conv" and w.value.size >= LEAST and _plain(w.node)]
    made: dict[str, list[Any]] = {}
    for weight in found:
        stored = _stored(onnx, weight, codes_behind(weight, source.coded), bits)
        for item in stored.values():
            if item.name not in constants(model):
                model.graph.initializer.append(item)
        made[weight.node.output[0]] = _nodes(onnx, weight, stored)
    nodes = [new for node in model.graph.node for new in made.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if made and not any(item.domain == "com.microsoft" for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return len(made)


def _plain(node: Any) -> bool:
    """Whether a Gemm is X @ W + b and no more."""
    values = {item.name: item for item in node.attribute}
    ones = all(name not in values or values[name].f == 1.0 for name in ("alpha", "beta"))
    return ones and not ("transA" in values and values["transA"].i)


def _stored(onnx: Any, weight: Weight, codes: Codes | None, bits: int) -> dict[str, Any]:
    """The packed codes and their scales as tensors of the graph, and how wide they are."""
    matrix_OI = weight.matrix_OI
    block, wide = nbits.block_size(matrix_OI.shape[1]), None if codes is None else nbits.held_by(codes.codes_OI)
    if codes is not None and wide is not None:
        codes_OI, width = codes.codes_OI, wide
        scale_OB = np.repeat(codes.scale_O[:, None], -(-matrix_OI.shape[1] // block), 1)
    else:
        width = bits if codes is None else max(bits, 8)
        codes_OI, scale_OB = nbits.rounded(matrix_OI, width, block)
    from_array = onnx.numpy_helper.from_array
    name = f"{weight.name}_{width}bits"
    return {
        "codes": from_array(nbits.packed(codes_OI, width, block), f"{name}_codes"),
        "scales": from_array(scale_OB.astype(np.float32).reshape(-1), f"{name}_scales"),
    }


def _nodes(onnx: Any, weight: Weight, stored: dict[str, Any]) -> list[Any]:
    node, (n_out, n_in) = weight.node, weight.matrix_OI.shape
    block = nbits.block_size(n_in)
    bits = 8 * stored["codes"].dims[2] // block
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    product = f"{node.output[0]}_product" if bias else node.output[0]
    inputs = [node.input[0], stored["codes"].name, stored["scales"].name]
    settings = {"K": n_in, "N": n_out, "bits": int(bits), "block_size": block, "accuracy_level": 4}
    name = f"{node.name or node.output[0]}_nbits"
    made = [onnx.helper.make_node("MatMulNBits", inputs, [product], name=name, domain="com.microsoft", **settings)]
    if bias:
        made.append(onnx.helper.make_node("Add", [product, bias], [node.output[0]], name=f"{name}_bias"))
    return made
