"""Refit: solve a linear reader anew so that it gives, on what it reads now, what it gave in the uncompressed network.

Linear layers and convolutions are linear in their weights: with the patches X that they read and the wished outputs Z,

    W = W₀ + (XᵀX + λ I)⁻¹ Xᵀ (Z - X W₀),

the ridge solution drawn towards the present weights W₀ (λ relative to the mean diagonal of XᵀX). No labels, no
gradients; layer by layer in the order of the forward pass, each layer also corrects what the layers before it left.
Products in the inputs' type, sums and the solution in float64. Cost: O(N F²) for N samples and positions of F inputs.

Reference: He et al., ICCV 2017, arXiv 1707.06168 (channel pruning, reconstruction step); differs in: drawn towards the
present weights, and what the layer reads comes from the compressed network.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.errors import ConfigError, DataError

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | _Convolution
"""What can be refitted."""


def refit(module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float = 1e-4) -> dict[str, Tensor]:
    """Solve a linear layer's or convolution's weights for wished outputs; the module is left as it is.

    Args:
        module: the layer, with the inputs that it has now.
        pairs: batches of what it reads and what it should give, shaped as its input and output.
        ridge: λ over the mean diagonal of XᵀX, >= 0.
    Returns:
        The new "weight", and "bias" where the layer has one, in the layer's shapes and type.
    Raises:
        ConfigError: the layer is of another kind, or the ridge is negative.
        DataError: no data, or data that are not finite.
    Example:
        >>> layer, x = nn.Linear(3, 2), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> new = refit(layer, [(x, x @ torch.ones(3, 2) + 5)], ridge=0.0)
        >>> new["weight"].round(decimals=4)[0], new["bias"].round(decimals=4)[0]
        (tensor([1., 1., 1.]), tensor(5.))
    """
    if not isinstance(module, Layer):
        raise ConfigError(
            f"A {type(module).__name__} cannot be refitted.", remedy="Refit nn.Linear or nn.Conv1d to 3d."
        )
    if ridge < 0:
        raise ConfigError(f"The 'ridge' of refit must be at least 0. Got {ridge} instead.")
    slabs = 1 if isinstance(module, nn.Linear) else module.groups
    present_GFO = _present(module, slabs)
    inner_GFF = torch.zeros(*present_GFO.shape[:2], present_GFO.shape[1], dtype=torch.float64)
    cross_GFO = torch.zeros_like(present_GFO)
    for x, z in pairs:
        read_GFN, wished_GON = _read(module, x.detach(), slabs), _wished(module, z.detach(), slabs)
        inner_GFF += (read_GFN @ read_GFN.mT).double().cpu()
        cross_GFO += (read_GFN @ wished_GON.mT).double().cpu()
    _check(inner_GFF, cross_GFO, type(module).__name__)
    return _unpacked(module, solve_towards(inner_GFF, cross_GFO, present_GFO, ridge))


def solve_towards(inner_GFF: Tensor, cross_GFO: Tensor, present_GFO: Tensor, ridge: float) -> Tensor:
    """W₀ + (A + λ I)⁻¹ (B - A W₀) for normal equations A W = B; the least change where A is singular and λ = 0."""
    mean = inner_GFF.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    ridged_GFF = inner_GFF + ridge * mean * torch.eye(inner_GFF.shape[-1], dtype=torch.float64)
    rest_GFO = cross_GFO - inner_GFF @ present_GFO
    factor, info = torch.linalg.cholesky_ex(ridged_GFF)
    if not bool(info.any()):
        return present_GFO + torch.cholesky_solve(rest_GFO, factor)
    return present_GFO + torch.linalg.pinv(ridged_GFF, hermitian=True) @ rest_GFO


def _present(module: Layer, slabs: int) -> Tensor:
    """The present weights as columns, shape (G, F, O / G); a bias is one more input that is always 1."""
    weight = module.weight.detach().double().cpu().flatten(1)
    columns = weight.reshape(slabs, -1, weight.shape[1]).mT
    if module.bias is None:
        return columns.contiguous()
    return torch.cat([columns, module.bias.detach().double().cpu().reshape(slabs, 1, -1)], 1)


def _read(module: Layer, x: Tensor, slabs: int) -> Tensor:
    """What the layer reads, shape (G, F, N): one column per sample and output position."""
    if isinstance(module, nn.Linear):
        columns = x.reshape(1, -1, x.shape[-1]).mT
    else:
        columns = _windows(module, x).reshape(slabs, module.weight[0].numel(), -1)
    columns = columns if columns.dtype == torch.float64 else columns.float()
    return columns if module.bias is None else F.pad(columns, (0, 0, 0, 1), value=1.0)


def _windows(conv: _Convolution, x: Tensor) -> Tensor:
    """The windows of a convolution, shape (I, kernel..., B, positions...), padded as the layer pads."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    n = len(conv.kernel_size)
    for d, (kernel, step, gap) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2):
        x = x.unfold(d, (kernel - 1) * gap + 1, step)[..., ::gap]
    return x.permute(1, *range(2 + n, 2 + 2 * n), 0, *range(2, 2 + n))


def _wished(module: Layer, z: Tensor, slabs: int) -> Tensor:
    """The wished outputs, shape (G, O / G, N), columns in the order of `_read`."""
    z = z if z.dtype == torch.float64 else z.float()
    n_out = module.weight.shape[0]
    return z.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).reshape(slabs, n_out // slabs, -1)


def _check(inner: Tensor, cross: Tensor, kind: str) -> None:
    if not bool(inner.any()):
        raise DataError(f"There is nothing to refit a {kind} on: no batches, or inputs that are all zero.")
    if not bool(torch.isfinite(inner).all() & torch.isfinite(cross).all()):
        raise DataError(f"The inputs or wished outputs of a {kind} are not finite.", remedy="Check the data.")


def _unpacked(module: Layer, solution_GFO: Tensor) -> dict[str, Tensor]:
    """Columns back to the layer's own tensors."""
    n_inputs = module.weight[0].numel()
    weight = solution_GFO[:, :n_inputs].mT.reshape(module.weight.shape).to(module.weight).contiguous()
    if module.bias is None:
        return {"weight": weight}
    return {"weight": weight, "bias": solution_GFO[:, n_inputs].reshape(-1).to(module.bias).contiguous()}
