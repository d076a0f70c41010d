"""From a quantised network to the tensors of its file, and back into the network: what runs is what is stored."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightfold.artifact.coded import CodedTensor, nearest_step, step_value
from weightfold.config import nearest
from weightfold.errors import ConfigError
from weightfold.quant.attached import attached, owners_of
from weightfold.quant.fake import codes_of, step_index
from weightfold.size import unique_state

FEW_VALUES = 16
"""A tensor of that few distinct values, and many more weights, was quantised before."""


def quantisable(model: nn.Module, pattern: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Parameters whose bits can be learned, and why others' cannot.

    Matrices, kernels and tables of embeddings can; norm scales and biases are vectors, and stored as they are or with
    one step for all.

    Raises:
        ConfigError: nothing matches the pattern, or a tensor is quantised already; names it.
    Example:
        >>> quantisable(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)))
        (['0.weight'], {})
    """
    named = {n: p for n, p in model.named_parameters() if pattern is None or fnmatch.fnmatchcase(n, pattern)}
    if not named and pattern is not None:
        names = [name for name, _ in model.named_parameters()]
        raise ConfigError(f"No parameter matches '{pattern}'.", remedy=nearest(pattern, names))
    owners = owners_of(model)
    under_way = {id(module._parameters[leaf]) for module, leaf in attached(model)}
    found, refused = [], {}
    for name, parameter in named.items():
        modules = [module for module, _ in owners[id(parameter)]]
        if any(isinstance(m, parametrize.ParametrizationList) for m in modules):
            raise ConfigError(
                f"'{name}' is parametrized: its values are made from others.",
                remedy="Remove the parametrization, or leave the tensor out with tensors='PATTERN'.",
            )
        if id(parameter) in under_way:
            raise ConfigError(f"'{name}' is being quantised by another run.", remedy="Convert that one first.")
        if parameter.ndim < 2 or any("norm" in type(m).__name__.lower() for m in modules):
            continue
        if not parameter.is_floating_point():
            raise _already(name, f"it holds {str(parameter.dtype).removeprefix('torch.')}")
        if not parameter.requires_grad:
            refused[name] = "it is frozen (requires_grad is False)"
            continue
        if parameter.element_size() < 4:
            refused[name] = f"it holds {str(parameter.dtype).removeprefix('torch.')}; train in float32, under autocast"
            continue
        if (n := _distinct(parameter)) <= FEW_VALUES < parameter.numel() // 16 and n > 1:
            raise _already(name, f"its {parameter.numel():,} weights have {n} values")
        found.append(name)
    return found, refused


def _distinct(parameter: Tensor) -> int:
    if parameter.is_meta:
        return parameter.numel()
    return int(parameter.detach().reshape(-1)[:65536].unique().numel())


def _already(name: str, why: str) -> ConfigError:
    return ConfigError(
        f"'{name}' is quantised already: {why}.",
        remedy="Start from the float weights, or leave the tensor out with tensors='PATTERN'.",
    )


def is_bias(name: str, value: Tensor) -> bool:
    """Whether a tensor is a bias vector."""
    return name.rpartition(".")[2].startswith("bias") and value.ndim == 1 and value.is_floating_point()


def coded_tensor(weight: Tensor, exponent_R: Tensor, bits_R: Tensor) -> CodedTensor:
    """The codes and steps of a quantised parameter."""
    codes = codes_of(weight, exponent_R, bits_R).reshape(weight.shape)
    steps = step_index(exponent_R).to("cpu", torch.int16).numpy()
    return CodedTensor(codes.to("cpu", torch.int16).numpy(), steps)


def coded_vector(vector: Tensor, bits: int) -> CodedTensor:
    """A vector on a grid of its own: one step, as small as the bits allow.

    Example:
        >>> coded_vector(torch.tensor([1.0, -0.5, 0.0]), 4).codes.tolist()
        [7, -3, 0]
    """
    values = vector.detach().to("cpu", torch.float32).numpy()
    limit = 2 ** (bits - 1) - 1
    largest = float(np.abs(values).max(initial=0.0))
    if largest == 0:
        return CodedTensor(np.zeros(values.shape, np.int16), np.zeros(1, np.int16))
    step = nearest_step([largest / limit])
    while largest / float(step_value(step)[0]) > limit + 0.5:
        step = step + np.int16(1)
    codes = np.clip(np.rint(values / step_value(step)[0]), -limit, limit)
    return CodedTensor(codes.astype(np.int16), step)


@dataclass(frozen=True, eq=False)
class CodedModel:
    """The tensors of a network as its file holds them.

    Args:
        coded: weights and biases, by name.
        plain: everything else, by name, numbers in half precision.
    """

    coded: Mapping[str, CodedTensor]
    plain: Mapping[str, np.ndarray]

    def n_weights(self) -> tuple[int, int]:
        """Codes that are not zero, and all of them."""
        codes = [tensor.codes for tensor in self.coded.values()]
        return sum(int(np.count_nonzero(c)) for c in codes), sum(c.size for c in codes)

    def load_into(self, model: nn.Module) -> None:
        """Give a plain network exactly the values of the file."""
        state = unique_state(model)
        with torch.no_grad():
            for name, tensor in self.coded.items():
                state[name].copy_(torch.from_numpy(tensor.values()))
            for name, value in self.plain.items():
                state[name].copy_(torch.from_numpy(value.astype(value.dtype)))


def coded_model(model: nn.Module, quantisers: Mapping[str, tuple[Tensor, Tensor]], bias_bits: int) -> CodedModel:
    """Take a network's state as it would be written.

    Args:
        quantisers: exponents and bits of each quantised parameter, by name.
        bias_bits: bits of biases, 2 to 16.
    """
    named = dict(model.named_parameters())
    coded, plain = {}, {}
    for name, value in unique_state(model).items():
        if name in quantisers:
            coded[name] = coded_tensor(named[name], *quantisers[name])
        elif name in named and is_bias(name, value):
            coded[name] = coded_vector(value, bias_bits)
        else:
            plain[name] = stored(value)
    return CodedModel(coded, plain)


def stored(value: Tensor) -> np.ndarray:
    """A tensor that has no codes as a file holds it: numbers in half precision."""
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value.numpy()
    half = value.to(torch.float16)
    return (half if bool(torch.isfinite(half).all()) else value.to(torch.float32)).numpy()
