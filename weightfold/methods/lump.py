"""Lump: neurons of a trained network aggregated by (approximate) differential equivalence, one tolerance ε.

By ``eps``, data-free: channels that are written alike, up to a ratio that the activation lets through, become one;
what reads them adds up (see `weightfold.lumping`). ε = 0 is exact: duplicates, rescaled ones behind ReLU, flipped ones
behind tanh, constant and unread channels, whole attention heads. By ``target``: the share of parameters to keep;
channels are represented by others, the readers solved anew by least squares on unlabelled inputs,

    B = E[a a'ᵀ] (E[a' a'ᵀ] + λ I)⁻¹,    W' = W B,

with a what a reader reads in the whole network and a' what is left of it in the lumped one: layer by layer, so that
each also corrects what the layers before it lost. Whom to keep is found by eliminating, one by one, the channel whose
loss costs its readers least after that correction. Without data, standard normal inputs stand in for standardised ones.
Cost: by ``eps`` O(C² F) a group, O(C F) at 0; by ``target`` G passes over the inputs and O(C³) a group.

Reference: Dhiman, Passarella, Tribastone, Valerio, arXiv 2606.01402 (forward equivalence with one ε; its encoding of
networks is not public, so conditions and read-back are derived in `weightfold.ode.network`); Prabhakar, arXiv
2110.03726 (rows); differs in: backward equivalence with ratios, complete linkage, the closed-form repair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.errors import ConfigError, DataError
from weightfold.graph.apply import apply
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import Edit, remove
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.trace import arguments
from weightfold.heads import members_of, partner_of
from weightfold.lumping import equal_rows, head_rows, lumped
from weightfold.methods.base import Method, Moment, Proposal, named_groups
from weightfold.redundancy import takes_mean
from weightfold.repair import distance
from weightfold.standin import first_rows, observable, paired, represent, solved
from weightfold.stats.running import Arguments, inputs_of
from weightfold.widths import Grid, Widths

TILTS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0)
"""Powers of two between the shares that the first and the last group keep: widths that are tried."""


WIDE = 256
"""Channels of a group above which only two of these are tried."""


class LumpConfig(Config):
    """Settings of `lump`."""

    eps: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """tolerance: largest distance of what writes two channels of a block, over the median in its group; 0 is exact"""
    target: float | None = Field(default=None, gt=0, le=1)
    """share of the parameters to keep, in place of `eps`; 0.5 without either"""
    linkage: Literal["complete", "single"] = "complete"
    """whether ε bounds a block's diameter, or the gaps in it (as ERODE does)"""
    samples: int = Field(default=1024, ge=2)
    """with `target` and without data: standard normal inputs to take"""
    ridge: float = Field(default=1e-6, ge=0)
    """with `target`: λ over the mean diagonal of E[a' a'ᵀ]"""
    tilt: bool = True
    """with `target`: try widths that favour early or late groups, and keep those nearest to the whole network"""
    at: float = Field(default=0.1, ge=0, lt=1)
    """when to lump, as a share of the run's steps; a one-shot lumps at once"""
    groups: str | None = None
    """pattern of the names of groups to lump; all by default"""
    min_channels: int = Field(default=1, ge=1)
    """with `target`: channels that every group keeps at least"""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> LumpConfig:
        if self.eps is not None and self.target is not None:
            raise ConfigError("LumpConfig takes one of 'eps' and 'target'.", remedy="Leave one out.")
        return self


class Lump(Method):
    """Lumps the network once: after a share of the run's steps, or at once on a trained network.

    Args:
        inputs: batches as a data loader gives them, to solve the readers on; targets behind the inputs are left out.

    Attributes:
        proposed: what the last step proposed.

    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[5], net[0].bias[5] = 2 * net[0].weight[1], 2 * net[0].bias[1]
        >>> moment = Moment(net, wf.trace(net, torch.zeros(1, 4)), 0, 0, {}, torch.zeros(1, 4), torch.Generator())
        >>> [proposal] = Lump(eps=0.0).step(moment)
        >>> proposal.edit.n_after, proposal.why["kinds"]
        (7, {'rescaled': 1})
    """

    name: ClassVar[str] = "lump"
    Config: ClassVar[type[Config]] = LumpConfig

    def __init__(self, config: Config | None = None, *, inputs: Iterable[Any] = (), **settings: Any) -> None:
        super().__init__(config, **settings)
        self.inputs = list(inputs)
        self._given: list[Arguments] = []
        self.proposed: list[Proposal] = []
        self._done = False

    def event(self, total_steps: int) -> int:
        """The step at which channels are lumped."""
        return max(1, round(self.config.at * total_steps)) if total_steps else 0

    def acts(self, step: int, total_steps: int) -> bool:
        """At its event; always in a one-shot."""
        return not total_steps or (not self._done and step >= self.event(total_steps))

    def due(self, total_steps: int) -> int | None:
        return None if self._done else self.event(total_steps)

    def prepare(self, moment: Moment) -> None:
        """Check that some group can be lumped.

        Raises:
            ConfigError: none can, or the pattern matches none.
        """
        self._groups(moment.graph)

    def step(self, moment: Moment) -> list[Proposal]:
        """Propose one edit for each group that can lose channels, in the order of the network."""
        if moment.total_steps and not self.acts(moment.step, moment.total_steps):
            return []
        self._done = True
        self._given = [inputs_of(moment.model, batch, moment.example) for batch in self.inputs]
        twin = independent_copy(moment.model).eval()
        self.proposed = self._by_eps(twin, moment) if self.config.eps is not None else self._by_target(twin, moment)
        return self.proposed

    def _groups(self, graph: ChannelGraph) -> list[ChannelGroup]:
        named = named_groups(graph, self.config.groups)
        found = [g for g in named if g.kind == "channels" and "merge" in g.admits and g.role("write")]
        if not found and not any(g.kind == "blocks" and "remove" in g.admits for g in named):
            reasons = sorted({r for g in named for k, r in g.reasons.items() if k == "merge"})
            raise ConfigError(
                f"No group of this network can be lumped: {'; '.join(reasons[:3]) or 'it has none'}.",
                remedy="weightfold trace says what is frozen, and why.",
            )
        place = {tensor: i for i, tensor in enumerate(graph.shapes)}
        return sorted(found, key=lambda g: min(place.get(a.tensor, 0) for a in g.role("write")))

    # by tolerance ---------------------------------------------------------------------------------------------------

    def _by_eps(self, twin: nn.Module, moment: Moment) -> list[Proposal]:
        graph, out = moment.graph, []
        names = [g.name for g in self._groups(graph)]
        for group in [g for g in named_groups(graph, self.config.groups) if g.kind == "blocks"]:
            graph, found = self._equal_heads(twin, graph, group)
            out += found
        example = _batch(moment.example)
        for name in names:
            group = next((g for g in graph if g.name == name), None)
            if group is None or "merge" not in group.admits:
                continue
            seen = first_rows(twin, group, example)
            found = lumped(twin, group, float(self.config.eps), self.config.linkage, seen)
            if found is None:
                continue
            edit = found.edit(group)
            whole_group = moment.graph[name]
            if self._given and observable(group) and group.n_channels == whole_group.n_channels:
                edit = self._compensated(moment.model, whole_group, twin, graph, edit)
            graph, _ = apply(twin, graph, edit)
            out.append(Proposal(edit, self._why(edit, found.kinds, found.mean)))
        return out

    def _compensated(
        self, whole: nn.Module, before: ChannelGroup, twin: nn.Module, graph: ChannelGraph, edit: Edit
    ) -> Edit:
        """The same lumping, with the readers solved for what they read in the whole network."""
        trial = independent_copy(twin)
        after, _ = apply(trial, graph, edit)
        pairs = paired(whole, before, trial, after[edit.group], self._given)
        reads, shift = {}, {}
        for axis in graph[edit.group].role("read"):
            wished, now = pairs[axis.key]
            reads[axis.key], left = solved(axis, wished, now, edit.carry, self.config.ridge, takes_mean(twin, axis))
            if left is not None:
                shift[axis.key] = left
        return Edit(edit.group, "lump", edit.n_channels, edit.carry, write=edit.write, reads=reads, shift=shift)

    def _why(self, edit: Edit, kinds: Mapping[str, int], mean: bool) -> dict[str, Any]:
        read = edit.B if not edit.reads else next(iter(edit.reads.values()))
        keep = set(edit.carry.tolist())
        gone = [i for i in range(edit.n_channels) if i not in keep]
        partner = read[gone].abs().argmax(1).tolist()
        return {
            "metric": "distance of what writes the channels",
            "unit": "share of the group's median row norm",
            "threshold": self.config.eps,
            "value": self.config.eps,
            "linkage": self.config.linkage,
            "rows": "weighted mean" if mean else "of the representative",
            "kinds": {kind: n for kind, n in kinds.items() if n},
            "dropped": [
                {"channel": i, "partner": int(edit.carry[k]), "coefficient": float(read[i, k])}
                for i, k in zip(gone, partner, strict=True)
            ],
            "rejected": [],
        }

    def _equal_heads(
        self, twin: nn.Module, graph: ChannelGraph, group: ChannelGroup
    ) -> tuple[ChannelGraph, list[Proposal]]:
        """Heads that are written alike: the output layer adds them up, then one goes."""
        observed = partner_of(graph, group)
        if observed is None or group.block is not None:
            return graph, []
        labels = equal_rows(head_rows(twin, group), 1e-6 if _single(twin) else 1e-14)
        first: dict[int, int] = {}
        same = {h: first.setdefault(int(label), h) for h, label in enumerate(labels.tolist())}
        if len(first) == group.n_channels:
            return graph, []
        [axis] = observed.role("read")
        members = members_of(group, observed, axis)
        n = observed.n_channels
        read = torch.eye(n, dtype=torch.float64)
        for head, keeper in same.items():
            if head != keeper:
                read[members[head], members[head]] = 0
                read[members[head], members[keeper]] = 1
        repair = Edit(observed.name, "lump", n, torch.arange(n), reads={axis.key: read})
        edit = remove(group, torch.tensor(sorted(first.values())))
        for part in (repair, edit):
            graph, _ = apply(twin, graph, part)
        dropped = [{"channel": h, "partner": k, "coefficient": 1.0} for h, k in same.items() if h != k]
        why = {
            "metric": "distance of what writes the heads",
            "unit": "share of a head's norm",
            "threshold": 0.0,
            "value": 0.0,
            "kinds": {"equal": len(dropped)},
            "dropped": dropped,
            "rejected": [],
        }
        return graph, [Proposal(edit, why, None, first=(repair,))]

    # by target ------------------------------------------------------------------------------------------------------

    def _by_target(self, twin: nn.Module, moment: Moment) -> list[Proposal]:
        share = 0.5 if self.config.target is None else self.config.target
        inputs = self._given or [x for x, _ in moment.probe] or surrogate(moment, self.config.samples)
        groups = [g for g in self._groups(moment.graph) if observable(g)]
        if not groups:
            raise ConfigError("No group can be lumped to a target: nothing that can be observed reads one.")
        best: tuple[float, list[Proposal]] | None = None
        for widths in self._widths(moment, groups, share):
            trial = independent_copy(twin)
            proposals = self._represented(moment, twin, trial, [g.name for g in groups], widths, inputs)
            lost = distance(trial, twin, inputs)["rms"]
            if best is None or lost < best[0]:
                best = lost, proposals
        assert best is not None
        return best[1]

    def _widths(self, moment: Moment, groups: Sequence[ChannelGroup], share: float) -> list[Widths]:
        grid = Grid(min_channels=self.config.min_channels)
        names = {n for n, p in moment.model.named_parameters() if n in moment.graph.shapes}
        whole = _count(moment.graph, names, {})
        tilts = TILTS if self.config.tilt and len(groups) > 1 else (0.0,)
        if max(g.n_channels for g in groups) > WIDE:
            tilts = tuple(t for t in tilts if t in (-1.0, 0.0))
        out: list[Widths] = []
        for tilt in tilts:
            factor = [2.0 ** (tilt * k / max(len(groups) - 1, 1)) for k in range(len(groups))]

            def at(scale: float, factor: Sequence[float] = factor) -> Widths:
                pairs = zip(groups, factor, strict=True)
                return {g.name: grid.nearest(g, min(scale * f, 1.0) * g.n_channels - 0.5) for g, f in pairs}

            low, high = 0.0, 4.0
            for _ in range(40):
                middle = (low + high) / 2
                fits = _count(moment.graph, names, at(middle)) <= share * whole
                low, high = (middle, high) if fits else (low, middle)
            least = _count(moment.graph, names, at(0.0))
            if least > share * whole:
                raise ConfigError(
                    f"The 'target' of {share:.3g} cannot be met: the narrowest widths leave {least / whole:.3g}.",
                    remedy="Raise it, or lower 'min_channels'.",
                )
            if at(low) not in out:
                out.append(at(low))
        return out

    def _represented(
        self,
        moment: Moment,
        whole: nn.Module,
        trial: nn.Module,
        names: Sequence[str],
        widths: Widths,
        inputs: Sequence[Any],
    ) -> list[Proposal]:
        graph, out = moment.graph, []
        for name in names:
            group = graph[name]
            width = widths[name]
            pairs = paired(whole, moment.graph[name], trial, group, inputs)
            edit, value = represent(trial, group, width, pairs, self.config.ridge)
            graph, _ = apply(trial, graph, edit)
            why = {
                "metric": "error of the readers' outputs after compensation",
                "unit": "share of the readers' output energy",
                "value": value,
                "threshold": None,
                "choice": "elimination",
                "ridge": self.config.ridge,
                "inputs": "given" if self.inputs else "probe" if moment.probe else "standard normal",
                "readers": {key[0]: len(a) for key, (a, _) in pairs.items()},
                "dropped": [{"channel": i} for i in sorted(set(range(group.n_channels)) - set(edit.carry.tolist()))],
                "rejected": [],
            }
            out.append(Proposal(edit, why, None))
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = bool(state["done"])


def _count(graph: ChannelGraph, names: set[str], widths: Widths) -> int:
    """Parameters at some widths; those not named stay."""
    shapes = {name: [float(n) for n in graph.shapes[name]] for name in names}
    for group in graph:
        share = 1 - widths.get(group.name, group.n_channels) / group.n_channels
        for axis in group.axes if share else ():
            if axis.tensor in shapes:
                shapes[axis.tensor][axis.dim] -= share * int((axis.index >= 0).sum()) / axis.slabs
    return round(sum(float(np.prod(shape)) for shape in shapes.values()))


def surrogate(moment: Moment, n_samples: int) -> list[Any]:
    """Standard normal inputs of the example's shape, for want of data.

    Raises:
        DataError: the example holds whole numbers, for which nothing stands in.
    """
    args, kwargs = arguments(moment.example)
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim for x in (*args, *kwargs.values())):
        raise DataError(
            "Standard normal numbers cannot stand in for this network's inputs.",
            remedy="Pass unlabelled inputs, or lump by 'eps'.",
        )
    batches = -(-n_samples // 128)
    draw = lambda x: torch.randn(128, *x.shape[1:], generator=moment.generator, dtype=x.dtype)  # noqa: E731
    return [(tuple(draw(x) for x in args), {k: draw(x) for k, x in kwargs.items()}) for _ in range(batches)]


def _batch(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = arguments(example)
    return tuple(args), dict(kwargs)


def _single(model: nn.Module) -> bool:
    return any(p.dtype != torch.float64 for p in model.parameters() if p.is_floating_point())
