"""What a practitioner should know of a trained model, from its weights alone: plain data for tables and JSON.

Symmetries, channels that are silent or alike, spectra, and where it would compress. Redundancy is told in the balanced
gauge: two channels are alike where what writes them points the same way, whatever their scale.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightfold.graph.trace import Example
from weightfold.weights.canon import semantic_hash
from weightfold.weights.compare import fitting
from weightfold.weights.point import Point, point
from weightfold.weights.spectra import Spectrum, spectra
from weightfold.weights.symmetry import Members, Symmetries
from weightfold.weights.work import rows_float

ALIKE = 0.999
"""Cosine of incoming weights above which two channels count as alike."""
FAINT = 1e-3
"""Share of the group's mean size below which a channel counts as faint."""


def facts(model: nn.Module, example: Example, *, found: Symmetries | None = None) -> dict[str, Any]:
    """Put together what a model's weights say.

    Returns:
        Plain data: ``hash``, ``parameters``, ``symmetries`` (counts), ``groups`` (redundancy), ``layers`` (spectra) and
        ``advice``, sentences.
    Raises:
        GraphError: a weight is not finite; names it.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> told = facts(net, torch.zeros(1, 4))
        >>> told["symmetries"]["permutations"], [g["name"] for g in told["groups"]]
        (8, ['0'])
    """
    found = fitting(found, model, example)
    where = point(found, model.state_dict(), centre_logits=False)
    groups = [redundancy(where, g) for g in found.members if g.kind == "channels" and g.n > 1]
    layers = spectra(model)
    return {
        "hash": semantic_hash(model, example, found=found),
        "parameters": sum(p.numel() for p in model.parameters()),
        "symmetries": _counts(found),
        "groups": groups,
        "layers": [_layer(s) for s in layers],
        "advice": advice(groups, layers),
    }


def _counts(found: Symmetries) -> dict[str, int]:
    kinds = Counter()
    for freedom in found.freedoms:
        kinds[freedom.kind] += freedom.channel.numel()
    return {
        "permutations": sum(g.n for g in found.members if g.free and g.kind == "channels"),
        "heads": sum(g.n for g in found.members if g.free and g.kind == "blocks"),
        "scales": kinds["scale"],
        "signs": kinds["sign"],
        "rotations": kinds["linear"],
        "norms": sum(n.writer is not None for n in found.norms),
        "gains": len({g.weight for g in found.gains}),
        "centred_heads": len(found.heads),
    }


def redundancy(where: Point, group: Members) -> dict[str, Any]:
    """How much of a group repeats itself: silent, unread, faint and alike channels, and its effective number.

    ``effective`` is exp of the entropy of the shares of incoming weights' squared singular values: how many directions
    the channels use, however many they are.
    """
    graph_group = where.symmetries.graph[group.name]
    roles = {axis.key: axis.role for axis in graph_group.axes}
    writes = [s for s in group.slots if roles.get((s.tensor, s.dim), "write") in ("write", "pointwise", "both")]
    reads = [s for s in group.slots if roles.get((s.tensor, s.dim), "write") == "read"]
    inward, outward = _rows(where, writes, group.n), _rows(where, reads, group.n)
    size_in, size_out = inward.norm(dim=1), outward.norm(dim=1)
    silent = (size_in == 0).nonzero().flatten().tolist() if inward.shape[1] else []
    deaf = outward.shape[1] and not graph_group.read_elsewhere
    unread = (size_out == 0).nonzero().flatten().tolist() if deaf else []
    both = size_in * size_out
    faint = ((both < FAINT**2 * both.mean()) & (both > 0)).nonzero().flatten().tolist()
    shares = torch.linalg.svdvals(inward).square() if inward.numel() else torch.zeros(0, dtype=torch.float64)
    shares = shares[shares > 0] / shares.sum().clamp_min(1e-300)
    effective = float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0
    alike = _alike(inward, size_in)
    return {
        "name": group.name,
        "channels": group.n,
        "silent": silent,
        "unread": [u for u in unread if u not in silent],
        "faint": faint,
        "alike": alike,
        "effective": effective,
        "spare": (len(set(silent) | set(unread)) + sum(len(c) - 1 for c in alike))
        if "merge" in graph_group.admits
        else 0,
    }


def _rows(where: Point, slots: Sequence[Any], n: int) -> Tensor:
    parts = [rows_float(where.tensors, s) for s in slots if s.tensor in where.tensors]
    return torch.cat(parts, 1) if parts else torch.zeros(n, 0, dtype=torch.float64)


def _alike(rows: Tensor, sizes: Tensor) -> list[list[int]]:
    """Sets of channels whose incoming weights point the same way, two or more each."""
    unit = rows / sizes.clamp_min(1e-300)[:, None]
    near = (unit @ unit.T > ALIKE) & (sizes[:, None] > 0) & (sizes[None, :] > 0)
    left, found = set(range(len(rows))), []
    while left:
        first = min(left)
        mine = [i for i in near[first].nonzero().flatten().tolist() if i in left] or [first]
        left -= {first, *mine}
        if len(mine) > 1:
            found.append(mine)
    return found


def _layer(s: Spectrum) -> dict[str, Any]:
    return {
        "name": s.name,
        "shape": [s.rows, s.columns],
        "norm": s.norm,
        "largest": s.largest,
        "alpha": s.tail.alpha,
        "alpha_error": s.tail.error,
        "alpha_blocks": s.tail_of_blocks.alpha,
        "alpha_hat": s.alpha_hat,
        "stable_rank": s.stable_rank,
        "effective_rank": s.effective_rank,
        "entropy": s.entropy,
    }


def advice(groups: Sequence[dict[str, Any]], layers: Sequence[Spectrum]) -> list[str]:
    """Where a model would compress, in sentences; nothing is promised that was not counted."""
    said = []
    for g in sorted(groups, key=lambda g: -g["spare"]):
        if g["spare"]:
            parts = [
                f"{len(g['silent'])} silent" if g["silent"] else "",
                f"{len(g['unread'])} unread" if g["unread"] else "",
                f"{sum(len(c) - 1 for c in g['alike'])} alike another" if g["alike"] else "",
            ]
            what = ", ".join(p for p in parts if p)
            said.append(f"'{g['name']}': {g['spare']} of {g['channels']} channels can go ({what})")
    thin = [g for g in groups if not g["spare"] and g["effective"] < 0.5 * g["channels"]]
    for g in sorted(thin, key=lambda g: g["effective"] / g["channels"])[:5]:
        used = f"{g['effective']:.1f} of {g['channels']} directions"
        said.append(f"'{g['name']}': incoming weights use {used}: fold or lump it first")
    for s in layers:
        least = min(s.rows, s.columns)
        if least >= 16 and s.stable_rank < 0.05 * least:
            said.append(f"'{s.name}': most of it lies in few directions (stable rank {s.stable_rank:.1f} of {least})")
    return said
