"""Tie: a layer becomes a copy of another. One Parameter stands in several places, so it is stored and trained once.

Pairs of layers of one kind and shape are ranked by how alike they are, after hidden units have been put into the same
order where the channel graph knows that this changes nothing:

    similarity = <W_a, W_b> / (|W_a| |W_b|),    shared value = W_a, or the mean

The most alike pair is tied if the loss on a probe allows it; else, if a rank is given, it is relaxed to
W_b = W_a + U V, the leading part of the residual's singular value decomposition. After some more steps the probe is
asked again, and a tie that hurts is undone. Biases and norms stay with their places. What becomes of gradients and of
optimiser state stands in `weightfold.sharing.ties`.

Ties save parameters, optimiser state and traffic. They save no time: a tied layer is still computed wherever it stands.
Cost: one pass over the weights of like layers, and two to four passes over the probe for each pair that is tried.
Reference: Dynamic Layer Tying, ICLR 2024, arXiv 2401.12819; differs in: chosen by similarity and a gate, not by an
agent. Relaxation: Bae et al. 2024, arXiv 2410.20672.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightfold.config import Config
from weightfold.errors import ConfigError, DataError, TraceError
from weightfold.fingerprint import fingerprint
from weightfold.gate import Batch, Loss, Reading, compare, losses
from weightfold.graph.apply import Undo
from weightfold.graph.group import ChannelGraph
from weightfold.graph.trace import Example, trace
from weightfold.ledger import Ledger
from weightfold.sharing.pairs import Pair, align_, inner_groups, pairs
from weightfold.sharing.ties import Link, Ties
from weightfold.size import parameters


class TieConfig(Config):
    """Settings of `tie`."""

    layers: str | None = None
    """pattern of paths of modules to tie as wholes, such as "blocks.?"; all linear and convolution layers if None"""
    similarity: float = Field(default=0.7, ge=-1, le=1)
    """least cosine of two layers' weights for a tie to be tried, -1 to 1"""
    max_increase: float = Field(default=0.02, ge=0)
    """how much one tie may raise the probe loss (its upper 95 % bound), in the loss's unit"""
    value: Literal["first", "mean"] = "mean"
    """what both take over: the earlier layer's weights, or the mean of both"""
    gradient: Literal["mean", "sum"] = "mean"
    """what a tied layer learns from: the mean over its places, or their sum (the true gradient)"""
    rank: int = Field(default=0, ge=0)
    """rank of the correction that a place may keep where a plain tie costs too much; 0 for none"""
    align: bool = True
    """whether hidden units are put into the same order first; needs an example"""
    start: float = Field(default=0.1, ge=0, le=1)
    """first attempt, as a share of the run's steps"""
    until: float = Field(default=0.8, ge=0, le=1)
    """last attempt, as a share of the run's steps"""
    every: int = Field(default=100, ge=1)
    """optimiser steps between attempts"""
    watch: int = Field(default=100, ge=1)
    """optimiser steps after which a tie is measured again, and undone if it hurts"""
    tries: int = Field(default=3, ge=1)
    """pairs that one attempt may try before it gives up"""


# the method -----------------------------------------------------------------------------------------------------------


class _LowRank(nn.Module):
    """What a place adds to the shared weight: U V in the weight's shape."""

    def __init__(self, residual: Tensor, rank: int) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(residual.flatten(1).double(), full_matrices=False)
        root = s[:rank].sqrt()
        self.U = nn.Parameter((u[:, :rank] * root).to(residual.dtype))
        self.V = nn.Parameter((root[:, None] * v[:rank]).to(residual.dtype))

    def forward(self, shared: Tensor) -> Tensor:
        return shared + (self.U @ self.V).reshape(shared.shape)


@dataclass(frozen=True)
class TieEvent:
    """One tie that was tried, or taken back.

    Args:
        kind: "tie", "refusal" or "untie".
        rank: of the correction that the copy keeps; 0 for a plain tie.
        measured: mean change of the probe loss; ``upper`` its one-sided 95 % bound.
        parameters: unique parameters afterwards.
    """

    step: int
    kind: str
    kept: str
    copy: str
    similarity: float
    rank: int
    parameters: int
    measured: float | None = None
    upper: float | None = None
    reason: str = ""


@dataclass(eq=False)
class _Bond:
    """A live tie of two layers, and what is needed to watch it and to end it."""

    pair: Pair
    links: list[Link]
    low_rank: list[tuple[nn.Module, str, _LowRank]]
    before: list[float]
    since: int
    watched: bool = True


class Tie:
    """Ties layers while a network trains, or at once; unties those that hurt.

    Args:
        config: settings; or pass them by name.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> with torch.no_grad():
        ...     _ = net[2].weight.copy_(net[0].weight + 0.001)
        >>> tie, x = Tie(), torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        >>> tie.prepare(net, loss=nn.functional.mse_loss, probe=[(x, net(x).detach())])
        >>> [(event.kind, event.kept, event.copy, event.parameters) for event in tie.once()]
        [('tie', '0', '2', 80)]
        >>> tie.convert() is net, net[0].weight is net[2].weight
        (True, True)
    """

    name: ClassVar[str] = "tie"
    Config: ClassVar[type[TieConfig]] = TieConfig
    by_itself: ClassVar[str] = (
        "Call compressor.convert() first; then tie.prepare(net, optimizer, loss=loss, probe=probe, total_steps=n), "
        "tie.step() after every optimiser step, and tie.convert()."
    )
    """how it is used, since a compressor does not take it"""

    def __init__(self, config: TieConfig | None = None, **settings: Any) -> None:
        self.config = TieConfig(**settings) if config is None else config
        self.events: list[TieEvent] = []
        self._forbidden: set[tuple[str, str]] = set()
        self._bonds: list[_Bond] = []
        self._step = 0

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        loss: Loss,
        probe: Sequence[Batch],
        example: Example | None = None,
        total_steps: int = 0,
        ledger: Ledger | None = None,
    ) -> None:
        """Find everything that can be found wrong before the first batch.

        Args:
            loss, probe: fixed batches of the training split that every tie is measured on.
            example: what `trace` takes; needed for the order of hidden units only.
            total_steps: length of the run in optimiser steps.
            ledger: where each tie, refusal and untie is recorded, with the fingerprint of the network after it.
        Raises:
            ConfigError: no pair of layers has the same kind and shapes, or there is no probe.
            DataError: weights are not finite, or the loss on the probe is not.
        """
        if not probe:
            raise ConfigError(
                "Ties are gated by a probe, which is empty.", remedy="Pass probe=[(inputs, targets), ...]."
            )
        if not pairs(model, self.config.layers):
            raise ConfigError("No two layers of this network have the same kind and weights of the same shapes.")
        self.model, self.loss, self.probe = model, loss, list(probe)
        self.example, self.total_steps, self.ledger = example, total_steps, ledger
        self._optimizers = () if optimizer is None else (optimizer,)
        self.ties = Ties(model, self._optimizers, self.config.gradient)
        if not all(value == value and abs(value) < float("inf") for value in self._losses()):
            raise DataError("The loss on the probe is not finite.", remedy="Check the probe's inputs and targets.")

    def _losses(self) -> list[float]:
        return losses(self.model, self.probe, self.loss)

    def step(self) -> list[TieEvent]:
        """Call once after every optimiser step. Most of the time nothing happens."""
        self._step += 1
        events = self._watch()
        first, last = (round(share * self.total_steps) for share in (self.config.start, self.config.until))
        if first <= self._step <= last and (self._step - first) % self.config.every == 0:
            events += self._attempt()
        self._keep(events)
        return events

    def once(self) -> list[TieEvent]:
        """Tie all that the gate allows, the most alike first."""
        events: list[TieEvent] = []
        new = self._attempt()
        while new:
            events += new
            new = self._attempt()
        self._keep(events)
        return events

    def _keep(self, events: list[TieEvent]) -> None:
        self.events += events
        if self.ledger is None:
            return
        for event in events:
            facts = {name: value for name, value in asdict(event).items() if name not in ("kind", "reason")}
            body = {"method": self.name, **facts, "why": event.reason, "fingerprint": fingerprint(self.model)}
            self.ledger.append(event.kind, body)

    def _attempt(self) -> list[TieEvent]:
        """Try the most alike pairs until one is tied."""
        events: list[TieEvent] = []
        for _ in range(self.config.tries):
            pair = next(iter(self._candidates()), None)
            if pair is None or pair.similarity < self.config.similarity:
                break
            events.append(self._try(pair))
            if events[-1].kind == "tie":
                break
            self._forbidden.add((pair.kept, pair.copy))
        return events

    def _candidates(self) -> list[Pair]:
        """Pairs that may still be tried, as alike as they are once aligned; a layer with copies is the one to stay."""
        kept, copies = ({getattr(bond.pair, side) for bond in self._bonds} for side in ("kept", "copy"))
        either = (pair.turned() if pair.copy in kept else pair for pair in pairs(self.model, self.config.layers))
        open_ = [
            pair
            for pair in either
            if (pair.kept, pair.copy) not in self._forbidden
            and pair.copy not in kept
            and not copies & {pair.kept, pair.copy}
        ]
        if not open_ or self.example is None or not self.config.align:
            return open_
        graph = self._graph()
        return open_ if graph is None else sorted((self._as_aligned(graph, p) for p in open_), key=_dissimilar)

    def _graph(self) -> ChannelGraph | None:
        try:
            return trace(self.model, self.example)
        except TraceError:
            return None

    def _as_aligned(self, graph: ChannelGraph, pair: Pair) -> Pair:
        """How alike a pair would be in the same order; the network is left as it was."""
        if not inner_groups(graph, pair.kept, pair.copy):
            return pair
        _, undos = align_(self.model, graph, pair.kept, pair.copy, self._optimizers)
        both = {pair.kept, pair.copy}
        aligned = next(p for p in pairs(self.model, self.config.layers) if {p.kept, p.copy} == both)
        for undo in reversed(undos):
            undo.restore()
        return replace(pair, similarity=aligned.similarity)

    def _try(self, pair: Pair) -> TieEvent:
        before, undos = self._losses(), self._align(pair)
        bond = self._tie(pair, before)
        reading = compare(before, self._losses())
        if not self._allowed(reading) and self.config.rank > 0:
            self._relax(bond)
            reading = compare(before, self._losses())
        if self._allowed(reading):
            self._bonds.append(bond)
            return self._event("tie", bond, reading)
        self._drop_low_rank(bond)
        for link in reversed(bond.links):
            self.ties.undo(link)
        for undo in reversed(undos):
            undo.restore()
        reason = f"the probe loss may rise by {reading.upper:.4g}, more than {self.config.max_increase:.4g}"
        return self._event("refusal", bond, reading, reason)

    def _allowed(self, reading: Reading) -> bool:
        return reading.upper == reading.upper and reading.upper <= self.config.max_increase

    def _align(self, pair: Pair) -> list[Undo]:
        graph = self._graph() if self.example is not None and self.config.align else None
        return [] if graph is None else align_(self.model, graph, pair.kept, pair.copy, self._optimizers)[1]

    def _tie(self, pair: Pair, before: list[float]) -> _Bond:
        links = [self.ties.tie(kept, copy, self.config.value) for kept, copy in pair.tensors]
        return _Bond(pair, links, [], before, self._step)

    @torch.no_grad()
    def _relax(self, bond: _Bond) -> None:
        """Let the copy keep a correction of low rank; the shared weights are then the earlier layer's own."""
        for link in bond.links:
            link.shared.copy_(link.before)
            module, leaf = link.places[0]
            correction = _LowRank(link.own - link.shared, self.config.rank)
            for owner, name in link.places:
                parametrize.register_parametrization(owner, name, correction)
            bond.low_rank.append((module, leaf, correction))
            for optimizer, _, _, group in link.states:
                optimizer.param_groups[group]["params"] += list(correction.parameters())

    @torch.no_grad()
    def _drop_low_rank(self, bond: _Bond) -> list[Tensor]:
        """Take the corrections out again; return what the copies held."""
        values = [getattr(module, leaf).detach().clone() for module, leaf, _ in bond.low_rank]
        for link, (_, _, correction) in zip(bond.links, bond.low_rank, strict=False):
            for owner, name in link.places:
                parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
            for optimizer in self._optimizers:
                _forget(optimizer, list(correction.parameters()))
        bond.low_rank = []
        return values

    def _watch(self) -> list[TieEvent]:
        """Measure ties again that have had time to settle; end those that hurt."""
        events = []
        for bond in [b for b in self._bonds if b.watched and self._step - b.since >= self.config.watch]:
            bond.watched = False
            reading = compare(bond.before, self._losses())
            if not self._allowed(reading):
                self.untie(bond)
                text = f"{self._step - bond.since} steps later the probe loss lies {reading.upper:.4g} higher"
                events.append(self._event("untie", bond, reading, text))
        return events

    @torch.no_grad()
    def untie(self, bond: _Bond) -> None:
        """End a tie: both layers go on from the values that they have now."""
        values = self._drop_low_rank(bond)
        for link in reversed(bond.links):
            self.ties.untie(link)
        for link, value in zip(bond.links, values, strict=False):
            link.own.copy_(value)
        self._bonds.remove(bond)
        self._forbidden.add((bond.pair.kept, bond.pair.copy))

    def _event(self, kind: str, bond: _Bond, reading: Reading, reason: str = "") -> TieEvent:
        pair, rank = bond.pair, self.config.rank if bond.low_rank else 0
        n = parameters(self.model)
        return TieEvent(
            self._step, kind, pair.kept, pair.copy, pair.similarity, rank, n, reading.mean, reading.upper, reason
        )

    def bonds(self) -> list[tuple[str, str, int]]:
        """Live ties: the layer kept, its copy, and the rank of the copy's correction."""
        return [(b.pair.kept, b.pair.copy, self.config.rank if b.low_rank else 0) for b in self._bonds]

    def convert(self) -> nn.Module:
        """Leave a plain module. Plain ties stay: one Parameter in several places; corrections are written out."""
        for bond in [b for b in self._bonds if b.low_rank]:
            self.untie(bond)
        self.ties.close()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs besides the state of network and optimiser: plain data."""
        return {
            "step": self._step,
            "bonds": [[b.pair.kept, b.pair.copy, bool(b.low_rank), b.before, b.since, b.watched] for b in self._bonds],
            "forbidden": sorted(self._forbidden),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Tie a freshly built and prepared network as an interrupted run had tied it; then load its state and the
        optimiser's, whose shapes fit now.

        Raises:
            ConfigError: a recorded pair of layers does not exist.
        """
        either = (p for pair in pairs(self.model, self.config.layers) for p in (pair, pair.turned()))
        found = {(pair.kept, pair.copy): pair for pair in either}
        for kept, copy, relaxed, before, since, watched in state["bonds"]:
            if (kept, copy) not in found:
                raise ConfigError(f"'{kept}' and '{copy}' of the recorded run are no pair of layers of this network.")
            bond = self._tie(found[kept, copy], list(before))
            if relaxed:
                self._relax(bond)
            bond.since, bond.watched = int(since), bool(watched)
            self._bonds.append(bond)
        self._step = int(state["step"])
        self._forbidden = {(kept, copy) for kept, copy in state["forbidden"]}


def _dissimilar(pair: Pair) -> float:
    return -round(pair.similarity, 12)


def _forget(optimizer: torch.optim.Optimizer, gone: list[nn.Parameter]) -> None:
    ids = {id(p) for p in gone}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    for p in gone:
        optimizer.state.pop(p, None)
