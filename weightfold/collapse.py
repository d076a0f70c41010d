"""Natural collapse: channels that training itself has made silent or equal.

Noise of stochastic gradients draws parameters towards sets where units are zero or identical, the more the higher the
learning rate and the smaller the batch. Equal units write alike and, by symmetry, are read alike: incoming rows that
coincide while the outgoing ones do not are a coincidence, not a collapse.

Reference: Chen et al., NeurIPS 2023, arXiv 2306.04251 (stochastic collapse; clusters on the normalised incoming
distance, confirmed by the outgoing one).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor, nn

from weightfold.graph.group import ChannelGroup
from weightfold.graph.observe import gather


@dataclass(frozen=True, eq=False)
class Collapse:
    """What is left of a group's channels.

    Args:
        silent: channels whose incoming weights are zero, numbers ascending.
        labels_C: cluster of each channel, shape (C,); silent channels form one of their own.
        n_independent: channels that differ from all others, and are not silent; one for each cluster.
        outgoing_agreement: mean distance of outgoing weights inside clusters over that between channels at large; 0 is
            perfect, 1 no relation; None where no two channels share a cluster.
    """

    silent: tuple[int, ...]
    labels_C: np.ndarray
    n_independent: int
    outgoing_agreement: float | None


def distances(rows_CF: Tensor) -> np.ndarray:
    """|a - b| / max(|a|, |b|) between rows, shape (C, C), 0 between two that are zero."""
    rows = rows_CF.double().numpy()
    norm = np.linalg.norm(rows, axis=1)
    largest = np.maximum(norm[:, None], norm[None, :])
    return squareform(pdist(rows)) / np.where(largest > 0, largest, 1.0)


def collapse(model: nn.Module, group: ChannelGroup, tolerance: float = 0.1) -> Collapse:
    """Find a group's silent and equal channels.

    Args:
        tolerance: largest normalised distance of incoming weights, between any two of a cluster, that counts as equal;
            rows shorter than this share of the longest count as silent.
    Example:
        >>> import torch, weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
        ...     net[0].weight[5], net[0].bias[5] = 0, 0
        >>> found = collapse(net, wf.trace(net, torch.zeros(1, 4))["0"])
        >>> found.silent, found.n_independent
        ((5,), 4)
    """
    incoming = gather(model, group, ("write", "pointwise"))
    norm = incoming.norm(dim=1).numpy()
    silent = np.flatnonzero(norm <= tolerance * max(float(norm.max()), 1e-300))
    live = np.setdiff1d(np.arange(group.n_channels), silent)
    labels = np.zeros(group.n_channels, np.int64)
    if len(live) > 1:
        tree = linkage(squareform(distances(incoming[live]), checks=False), "complete")
        labels[live] = fcluster(tree, tolerance, "distance")
    else:
        labels[live] = 1
    return Collapse(tuple(silent.tolist()), labels, len(set(labels[live].tolist())), _agreement(model, group, labels))


def _agreement(model: nn.Module, group: ChannelGroup, labels: np.ndarray) -> float | None:
    if not group.role("read"):
        return None
    away = distances(gather(model, group, ("read",)))
    together = (labels[:, None] == labels[None, :]) & (labels > 0)[:, None]
    np.fill_diagonal(together, False)
    if not together.any():
        return None
    apart = ~together & ~np.eye(len(labels), dtype=bool)
    return float(away[together].mean() / max(float(away[apart].mean()), 1e-300)) if apart.any() else 0.0
