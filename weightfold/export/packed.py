"""Packed files of quantised networks: a module and the codes behind its weights to a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from weightfold.artifact import Builder
from weightfold.artifact.coded import CodedTensor
from weightfold.artifact.matrix import Coding
from weightfold.artifact.packed import SUFFIX, Array, Packed, PackedSizes, promised_bytes, read_packed, write_packed
from weightfold.blueprint import Blueprint, find_aliases, rebuild_, state_tensors
from weightfold.errors import ArtifactError, ConfigError, ExportError
from weightfold.export.saved import make, structure_of
from weightfold.export.source import Source
from weightfold.quant.codes import CodedModel


def save_packed(
    source: Source, coded: Mapping[str, CodedTensor], path: str | Path, *, coding: Coding = "entropy"
) -> PackedSizes:
    """Write a quantised module as a packed file, at one stroke.

    Tensors that are not coded are kept to the bit, as float16 where this is exact.

    Args:
        source: the module, whose weights are the values of the codes, and what is known of it.
        coded: the codes by name of the tensor; a tied tensor under the first of its names.
        path: the file, replaced if it exists.
        coding: "entropy" for the fewest bytes, "packed" for codes end to end.
    Returns:
        sizes: bytes of the file, its header and its tensors.
    Raises:
        ExportError: a tensor of the module does not hold the values of its codes, or the module lacks it; names it.
        ArtifactError: a tensor has a type that the file cannot hold, or the file cannot be written.
    Example:
        >>> import tempfile
        >>> from weightfold.artifact import Builder
        >>> from weightfold.blueprint import Blueprint
        >>> net = nn.Linear(3, 2)
        >>> codes = CodedTensor(np.array([[1, 0, -1], [0, 2, 0]], np.int16), np.array([-16, -8], np.int16))
        >>> fill_(net, {"weight": codes})
        >>> source = Source(net, (), Blueprint.of(net), Builder(kind="instance", name="Linear"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = save_packed(source, {"weight": codes}, f"{folder}/net.wfp")
        ...     twin = load_packed(f"{folder}/net.wfp", nn.Linear(3, 2))
        >>> torch.equal(twin.weight, net.weight) and torch.equal(twin.bias, net.bias)
        True
    """
    structure = structure_of(source.model, source.before, source.builder, source.inputs, source.ledger_head)
    return write_packed(path, structure, coded, _plain(source.model, coded), coding=coding)


def save_compressed(
    model: nn.Module, tensors: CodedModel, path: str | Path, *, original: nn.Module, ledger_head: str | None = None
) -> PackedSizes:
    """Write a network that compressed itself in a loop of your own as a packed file.

    Args:
        model: what `Compressor.convert` gave.
        tensors: `SelfCompress.result`, its codes.
        path: the file, replaced if it exists; its name ends in ".wfp".
        original: a network made as the model was, before any training; its weights do not matter.
        ledger_head: hash of the last entry of the run's ledger.
    Returns:
        sizes: bytes of the file, its header and its tensors.
    Raises:
        ExportError: a tensor of the model was changed after it was converted; names it.
        ConfigError: the name has another ending.
    Example:
        >>> import tempfile
        >>> from weightfold.quant.codes import CodedModel
        >>> tensors = CodedModel({"weight": CodedTensor(np.eye(2, 3, dtype=np.int16), np.zeros(2, np.int16))}, {})
        >>> net = nn.Linear(3, 2, bias=False)
        >>> tensors.load_into(net)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = save_compressed(net, tensors, f"{folder}/net.wfp", original=nn.Linear(3, 2, bias=False))
        ...     load_packed(f"{folder}/net.wfp", nn.Linear(3, 2, bias=False)).weight.tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    if Path(path).suffix != SUFFIX:
        raise ConfigError(f"The name of a packed file must end in '{SUFFIX}'. Got '{path}' instead.")
    builder = Builder(kind="instance", name=type(original).__name__)
    return save_packed(Source(model, (), Blueprint.of(original), builder, ledger_head), tensors.coded, path)


def promised_packed_bytes(source: Source, coded: Mapping[str, CodedTensor], *, coding: Coding = "entropy") -> float:
    """What `save_packed` will write, in bytes, without coding it; within a byte or two."""
    structure = structure_of(source.model, source.before, source.builder, source.inputs, source.ledger_head)
    return promised_bytes(structure, coded, _plain(source.model, coded), coding=coding)


def load_packed(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Build the module of a packed file, with exactly the decoded weights.

    Args:
        path: the file.
        model: for a model that is not built in: an instance as it was made before any edit. It is changed in place.
    Returns:
        model: on the CPU, in evaluation mode.
    Raises:
        ArtifactError: the file is missing, truncated, changed or newer, or does not fit the model; names the tensor.
        ConfigError: the model is of the user's own class, and none was passed.
    """
    path = Path(path)
    packed = read_packed(path)
    made = make(packed.structure.builder, path) if model is None else model
    rebuild_(made, packed.structure, str(path))
    _fill_all_(made, packed, path)
    return made.eval()


def fill_(model: nn.Module, coded: Mapping[str, CodedTensor]) -> None:
    """Put the values of codes into a module.

    Args:
        model: changed in place.
        coded: by name of the tensor.
    Raises:
        ExportError: the module has no such tensor, or one of another shape.
    """
    own = state_tensors(model)
    with torch.no_grad():
        for name, tensor in coded.items():
            _check(name, own.get(name), tensor.shape)
            own[name].copy_(torch.from_numpy(tensor.values()))


def _check(name: str, own: Tensor | None, shape: tuple[int, ...]) -> None:
    if own is None or tuple(own.shape) != shape:
        found = "has no such tensor" if own is None else f"has one of shape {tuple(own.shape)}"
        raise ExportError(f"'{name}' is coded with the shape {shape}; the model {found}.")


def _plain(model: nn.Module, coded: Mapping[str, CodedTensor]) -> dict[str, Array]:
    """The tensors that are not coded; and make sure that the others are what their codes say."""
    own, aliases = state_tensors(model), find_aliases(model)
    for name, tensor in coded.items():
        _check(name, own.get(name), tensor.shape)
        if name in aliases:
            raise ExportError(
                f"'{name}' is tied to '{aliases[name]}'.",
                remedy=f"Give its codes as '{aliases[name]}', and only there.",
            )
        if not torch.equal(own[name].detach().cpu(), torch.from_numpy(tensor.values())):
            raise ExportError(
                f"'{name}' does not hold the values of its codes: the file would be another network.",
                remedy="Put them in first, for example with weightfold.export.packed.fill_.",
            )
    return {name: _array(name, own[name]) for name in own if name not in coded and name not in aliases}


def _array(name: str, tensor: Tensor) -> Array:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise ArtifactError(f"'{name}' is of type {tensor.dtype}; packed files hold networks of 32-bit floats.")
    array = tensor.detach().cpu().contiguous().numpy()
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if (half.astype(np.float32).view(np.int32) == array.view(np.int32)).all() else array


def _fill_all_(model: nn.Module, packed: Packed, path: Path) -> None:
    own, arrays = state_tensors(model), packed.arrays()
    known = {*arrays, *packed.structure.aliases}
    for name in own:
        if name not in known:
            raise ArtifactError(f"'{path}' lacks '{name}', which the model has.", remedy="Check which model it is.")
    with torch.no_grad():
        for name, array in arrays.items():
            if name not in own or tuple(own[name].shape) != array.shape:
                found = "has no such tensor" if name not in own else f"has one of shape {tuple(own[name].shape)}"
                raise ArtifactError(f"'{path}' holds '{name}' of shape {array.shape}; the model {found}.")
        for name, array in arrays.items():
            own[name].copy_(torch.from_numpy(array.copy()))
