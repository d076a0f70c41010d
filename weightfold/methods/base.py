"""What a compression method is: it looks, and returns edits. The compressor alone changes the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError, DataError, WeightfoldError
from weightfold.gate import Batch, Loss
from weightfold.graph.edit import Edit
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.ranks import Ranks

if TYPE_CHECKING:
    from weightfold.graph.observe import SecondMoment

Key = tuple[str, int]
"""(tensor, dimension) of a reading axis."""

NO_STATISTICS = (
    "At once: pass inputs, as in once(batches). "
    "In a run: call the compressor's network in training mode before step(), or pass loss= and probe=."
)
"""What to do where a method needs statistics of inputs and there are none."""


def _refuse_all(group: str, why: str) -> None:
    raise DataError(f"'{group}': {why}")


@dataclass(frozen=True, eq=False)
class Moment:
    """All that a method may look at when it decides.

    Args:
        step: optimiser steps done so far.
        total_steps: length of the run; 0 for a one-shot on a trained network.
        statistics: second moments of what each observed reader reads.
        example: the example that the model was traced with.
        generator: the only source of randomness.
        probe: fixed batches from the training split; empty without a probe.
        loss: what the probe is measured by.
        optimizers: those whose state follows every edit; to be looked at, never stepped.
        frozen: groups that an undone event has closed.
        autocast: the mixed precision that training uses.
        record: write a fact into the ledger: kind, body (hashed: what would be the same in a second run), aside.
        ranks: the processes that train this network.
        refuse: leave one group out, with the reason, and go on with the others; by default that is an error.
        recorded: whether a ledger is kept, whose hash stands in the run's files.
    """

    model: nn.Module
    graph: ChannelGraph
    step: int
    total_steps: int
    statistics: Mapping[Key, SecondMoment]
    example: Any
    generator: torch.Generator
    probe: Sequence[Batch] = ()
    loss: Loss | None = None
    optimizers: Sequence[torch.optim.Optimizer] = ()
    frozen: Collection[str] = ()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    record: Callable[[str, dict[str, Any], dict[str, Any]], None] = lambda *_: None
    ranks: Ranks = field(default_factory=Ranks)
    refuse: Callable[[str, str], None] = _refuse_all
    recorded: bool = False


@dataclass(frozen=True, eq=False)
class Proposal:
    """An edit, why it is proposed, and how to ask for less of it.

    Args:
        why: plain data for the ledger: metric, value, threshold, partners, rejected alternatives and the reason.
        predicted: predicted increase of the loss, in the unit that ``why["unit"]`` names.
        less: the same proposal with about half of the cut; None when nothing is left to halve.
        first: edits on other groups that belong to it and go before it.
    """

    edit: Edit
    why: dict[str, Any] = field(default_factory=dict)
    predicted: float | None = None
    less: Callable[[], Proposal | None] = lambda: None
    first: tuple[Edit, ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All that is applied, in order."""
        return (*self.first, self.edit)


def named_groups(graph: ChannelGraph, pattern: str | None, widths: Collection[str] = ()) -> list[ChannelGroup]:
    """The groups whose names a pattern matches; all without one.

    Args:
        widths: names that settings mention besides, which must exist.
    Raises:
        ConfigError: the pattern matches none, or a name is unknown; gives the nearest.
    """
    names = [group.name for group in graph]
    for name in widths:
        if name not in names:
            raise ConfigError(f"The 'widths' name no group '{name}'.", remedy=nearest(name, names))
    found = [group for group in graph if pattern is None or fnmatch.fnmatchcase(group.name, pattern)]
    if not found and pattern is not None:
        raise ConfigError(f"No group matches '{pattern}'.", remedy=nearest(pattern, names))
    return found


def touched_groups(graph: ChannelGraph, methods: Sequence[Method]) -> set[str]:
    """The groups that some methods may edit, and those that share an axis with one of them."""
    named = {name for method in methods for name in method.touches(graph)}
    axes = {axis.key for group in graph if group.name in named for axis in group.axes}
    return {group.name for group in graph if any(axis.key in axes for axis in group.axes)}


def check_liked(graph: ChannelGraph, names: Collection[str]) -> None:
    """See that a table of widths was measured on this network.

    Raises:
        ConfigError: it names a group that the network lacks; gives the nearest.
    """
    known = [group.name for group in graph]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"The widths of 'liked' name no group '{name}'.",
                remedy=f"{nearest(name, known)} A table of weightfold tune belongs to the network it was made of.",
            )


@contextmanager
def leaving_out(moment: Moment, group: str) -> Iterator[None]:
    """Where something of one group is wrong, refuse that group and go on."""
    try:
        yield
    except WeightfoldError as error:
        moment.refuse(group, str(error))


class Refused(WeightfoldError):
    """A method has looked and decided against any edit: the run goes on as it is, and the reason is recorded.

    Args:
        body: what was weighed, for the ledger.
        aside: facts of the clock.
    """

    def __init__(self, message: str, body: Mapping[str, Any], aside: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.body, self.aside = dict(body), dict(aside)


class Method:
    """Base of every method: a frozen configuration and any of the calls below.

    The file's name is the registered name.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    alone: ClassVar[bool] = False
    """whether a run can have but one of them"""

    def __init__(self, config: Config | None = None, **settings: Any) -> None:
        self.config: Any = self.Config(**settings) if config is None else config

    def prepare(self, moment: Moment) -> None:
        """Look at the network before the first batch; raise what can be found wrong now."""

    def touches(self, graph: ChannelGraph) -> Collection[str]:
        """Names of the groups that the method may edit: those, and what shares an axis with them, are proved first."""
        named = named_groups(graph, getattr(self.config, "groups", None))
        return [group.name for group in named if group.admits & {"remove", "merge"}]

    def observes(self, step: int, total_steps: int) -> bool:
        """Whether statistics are to be taken during this step (one-shot: step 0 of 0)."""
        return False

    def acts(self, step: int, total_steps: int) -> bool:
        """Whether `step` may propose anything after this step; the same on every rank of a distributed run."""
        return True

    def due(self, total_steps: int) -> int | None:
        """The step by which it acts; None once it has, or where it waits for none."""
        return None

    def watch(self, total_steps: int) -> int:
        """Steps after an accepted event at which the loss must be back where it was; 0: nobody looks."""
        return 0

    def penalty(self) -> Tensor | None:
        """What the method adds to the user's loss, differentiable; None for nothing."""
        return None

    def step(self, moment: Moment) -> list[Proposal]:
        """Edits to try now; most of the time none."""
        return []

    # what a method holds beside the network -----------------------------------------------------------------------

    def updates(self, step: int, total_steps: int) -> bool:
        """Whether `update` is to be called after this step; the same on every rank of a distributed run."""
        return False

    def update(self, moment: Moment) -> None:
        """After an optimiser step, on every rank: train what the method holds beside the network."""

    def followers(self) -> Mapping[str, str]:
        """Tensors beside the network that follow the rows of others in every edit: follower -> tensor, by name."""
        return {}

    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those that train the followers."""
        return ()

    def convert(self, moment: Moment) -> None:
        """At the end: leave a plain network, and take everything off that was put beside it."""

    # restarts -----------------------------------------------------------------------------------------------------

    def take_up(self, moment: Moment) -> None:
        """After `load_state_dict`, on a network of the interrupted run's structure: put everything beside it again."""

    def state_dict(self) -> dict[str, Any]:
        """What the method needs to go on after a restart, as plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an interrupted run."""

    def shared_state(self) -> dict[str, Any]:
        """What the other ranks of a distributed run take up after this one has decided; all of the state by default."""
        return self.state_dict()
