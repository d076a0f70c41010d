"""Heads of one attention layer that share their rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightfold.errors import ConfigError
from weightfold.graph.apply import find_tensor


class _Rows(nn.Module):
    """Stored blocks of rows, each shown in several places."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index, persistent=False)

    def forward(self, stored: Tensor) -> Tensor:
        return stored.index_select(0, self.index)


class TiedHeads:
    """Heads of one attention layer that share their rows of a projection, in training.

    The stored parameter is the block means, one for each label, as grouped-query attention starts. `convert` writes the
    rows out again: a plain layer with equal heads. That saves parameters and optimiser state in training; after it only
    a file or a runtime that knows grouped heads can use them. The gradient of a stored row is the sum over its heads.

    Args:
        model: its modules are parametrized until `convert`.
        tensors: projections, and biases, whose rows (dimension 0) are heads one after the other.
        labels_H: which heads share, one label for each head.
    Raises:
        ConfigError: rows do not divide into heads, labels are not 0 to the largest, or a tensor is no parameter.
    Example:
        >>> keys = nn.Linear(6, 8, bias=False)
        >>> heads = TiedHeads(keys, ["weight"], torch.tensor([0, 1, 0, 1]))
        >>> sum(p.numel() for p in keys.parameters()), torch.equal(keys.weight[:2], keys.weight[4:6])
        (24, True)
        >>> heads.convert()
        >>> type(keys).__name__, keys.weight.numel(), torch.equal(keys.weight[:2], keys.weight[4:6])
        ('Linear', 48, True)
    """

    def __init__(self, model: nn.Module, tensors: Sequence[str], labels_H: Tensor) -> None:
        n_kept = int(labels_H.max()) + 1
        if sorted(set(labels_H.tolist())) != list(range(n_kept)):
            raise ConfigError(f"The labels of heads must be 0 to the largest, none left out. Got {labels_H.tolist()}.")
        self._held = [self._checked(model, name, len(labels_H)) for name in tensors]
        self._order = {owner: list(owner._parameters) for owner, _, _ in self._held}
        for owner, leaf, parameter in self._held:
            blocks = parameter.detach().unflatten(0, (len(labels_H), -1))
            mean = torch.stack([blocks[labels_H == label].mean(0) for label in range(n_kept)])
            rows = torch.arange(n_kept * blocks.shape[1]).reshape(n_kept, -1)
            parameter.data = mean.flatten(0, 1)
            parameter.grad = None
            index = rows[labels_H].flatten().to(parameter.device)
            parametrize.register_parametrization(owner, leaf, _Rows(index), unsafe=True)

    @staticmethod
    def _checked(model: nn.Module, name: str, n_heads: int) -> tuple[nn.Module, str, nn.Parameter]:
        owner, leaf, parameter = find_tensor(model, name)
        if not isinstance(parameter, nn.Parameter) or isinstance(owner, nn.RNNBase):
            raise ConfigError(f"'{name}' is no parameter of a projection.")
        if parameter.shape[0] % n_heads:
            raise ConfigError(f"The {parameter.shape[0]} rows of '{name}' do not divide into {n_heads} heads.")
        return owner, leaf, parameter

    def convert(self) -> None:
        """Leave plain layers whose heads have equal rows."""
        for owner, leaf, parameter in self._held:
            value = getattr(owner, leaf).detach().clone()
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
            parameter.data, parameter.grad = value, None
        for owner, order in self._order.items():
            owner._parameters = {name: owner._parameters[name] for name in order}


def like_heads(weights: Iterable[Tensor], n_heads: int, n_kept: int) -> Tensor:
    """Group heads by the cosine of their rows, average linkage: labels for `TiedHeads`.

    Args:
        weights: projections of the same heads, such as keys and values.
    Returns:
        labels_H: in order of first use, int64.
    Example:
        >>> like_heads([torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]])], n_heads=3, n_kept=2)
        tensor([0, 1, 0])
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if not 1 <= n_kept <= n_heads:
        raise ConfigError(f"Of {n_heads} heads 1 to {n_heads} can be kept. Got {n_kept}.")
    if n_kept == n_heads:
        return torch.arange(n_heads)
    rows = [nn.functional.normalize(w.detach().double().reshape(n_heads, -1), dim=1) for w in weights]
    found = fcluster(linkage(torch.cat(rows, 1).cpu().numpy(), "average"), n_kept, "maxclust")
    order = {label: at for at, label in enumerate(dict.fromkeys(found.tolist()))}
    return torch.tensor([order[label] for label in found.tolist()])
