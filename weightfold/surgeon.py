"""The hands of the compressor: a network with its optimisers and averages, the edits in it, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from weightfold.errors import EditError
from weightfold.graph import optim
from weightfold.graph.apply import Companion, Undo, after, apply, check_names, find_tensor
from weightfold.graph.edit import Edit
from weightfold.graph.followers import with_followers, without_followers
from weightfold.graph.group import ChannelGraph
from weightfold.graph.unfold import unfold_undo, widen
from weightfold.history import Origin
from weightfold.methods.base import Proposal
from weightfold.ranks import unwrapped


@dataclass(eq=False)
class Applied:
    """An edit in the network, and what is needed to take it back.

    Args:
        graph: as it was before the edit; ``origin`` likewise.
        undo: what was replaced; None once nobody may want it back.
        rise: its share of what its event has raised the probe loss by; 0 where that was not measured.
    """

    edit: Edit
    graph: ChannelGraph
    origin: Origin
    undo: Undo | None
    rise: float = 0.0


@dataclass(frozen=True, eq=False)
class Trial:
    """An edit of a proposal that was applied and is not yet kept; the graphs before and after it."""

    proposal: Proposal
    edit: Edit
    before: ChannelGraph
    after: ChannelGraph
    undo: Undo


class Surgeon:
    """Applies edits to a network in training, counts them, and takes them back.

    Args:
        model: the user's module.
        graph: its channel graph.

    Attributes:
        applied: the edits in the network, in order.
        own: optimisers of what methods hold beside the network; their state follows every edit too.
        journal: what was done since it was last emptied: edits, and numbers of edits that were unfolded.
        touched: whether any tensor was changed since it was last lowered, also where all was put back.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        self.model = model
        self.graph = graph
        self.origin = Origin(graph)
        self.optimizers: tuple[Optimizer, ...] = ()
        self.own: tuple[Optimizer, ...] = ()
        self.averaged: tuple[Companion, ...] = ()
        self.applied: list[Applied] = []
        self.journal: list[Edit | int] = []
        self.touched = False

    def attach(self, optimizers: Sequence[Optimizer], averaged: Iterable[Companion]) -> None:
        """Name what must follow every edit.

        Raises:
            EditError: an optimiser holds other parameters or cannot follow, or an averaged copy is of another network.
        """
        optim.check_follows(optimizers)
        optim.assert_live(self.model, optimizers)
        self.optimizers, self.averaged = tuple(optimizers), tuple(map(_own, averaged))
        for companion in self.averaged:
            if isinstance(companion, nn.Module):
                check_shapes(companion, self.graph, OTHER_AVERAGE)
            else:
                check_names(companion, self.graph, self.graph.shapes)

    def follow(self, followers: Mapping[str, str], own: Iterable[Optimizer]) -> None:
        """Let tensors that a method holds beside the network take part in every edit; see `with_followers`."""
        self.own = tuple(dict.fromkeys((*self.own, *own)))
        new = followers.keys() - self.graph.followers
        self.graph = with_followers(self.graph, followers)
        for applied in self.applied:
            applied.graph = with_followers(applied.graph, followers)
        self._hold_followers(sorted(new))

    def _hold_followers(self, names: Sequence[str]) -> None:
        """What followers would have been before the edits that may still be taken back: their mean where unknown."""
        values = {name: find_tensor(self.model, name)[2].detach() for name in names}
        for applied in reversed(self.applied):
            if applied.undo is None:
                break
            group, narrow = applied.graph[applied.edit.group], after(applied.graph, applied.edit)[applied.edit.group]
            for name in dict.fromkeys(a.tensor for a in group.axes if a.tensor in values):
                now = values[name].double()
                kept = widen(torch.ones_like(now), group, narrow, applied.edit, name) > 0
                wide = torch.where(kept, widen(now, group, narrow, applied.edit, name), now.mean())
                values[name] = wide.to(values[name].dtype)
                applied.undo.tensors.append((self.model, name, values[name]))

    def unfollow(self) -> None:
        """The methods hold nothing any more."""
        self.own, self.graph = (), without_followers(self.graph)
        self.forget(0)

    def attempt(self, edit: Edit, graph: ChannelGraph | None = None) -> tuple[ChannelGraph, Undo]:
        """Apply an edit without counting it yet; ``graph`` if other attempts came before."""
        self.touched = True
        return apply(self.model, graph or self.graph, edit, (*self.optimizers, *self.own), self.averaged)

    @property
    def spent(self) -> float:
        """By how much the edits that stand have raised the probe loss."""
        return sum(applied.rise for applied in self.applied)

    def take_rises(self, rises: Sequence[float]) -> None:
        """Take up what each edit was measured to have raised the probe loss by."""
        for applied, rise in zip(self.applied, rises, strict=True):
            applied.rise = float(rise)

    def keep(self, edit: Edit, graph: ChannelGraph, undo: Undo, rise: float = 0.0) -> None:
        """Count an attempted edit as part of the network."""
        self.applied.append(Applied(edit, self.graph, self.origin.copy(), undo, rise))
        self.origin.follow(self.graph[edit.group], edit)
        self.graph = graph
        self.journal.append(edit)

    def restore(self, undos: Sequence[Undo]) -> None:
        """Take attempts back that were not counted, the latest first."""
        for undo in reversed(undos):
            undo.restore()

    def drop(self, n_latest: int) -> None:
        """Take back edits that were kept a moment ago, as if they had never been."""
        for _ in range(n_latest):
            last = self.applied.pop()
            assert last.undo is not None
            last.undo.restore()
            self.graph, self.origin = last.graph, last.origin
            self.journal.pop()

    def forget(self, n_latest: int) -> None:
        """Hold in memory what the latest edits replaced, and nothing older."""
        for applied in self.applied[: len(self.applied) - n_latest]:
            applied.undo = None

    def undo(self) -> Edit:
        """Take the latest edit back bit for bit, with all that was trained since.

        Raises:
            EditError: there is nothing to undo, or what the edit replaced is not in memory any more.
        """
        self.check_held(1)
        last = self.applied.pop()
        assert last.undo is not None
        self._forget_newer_state(last.undo, all_new=True)
        last.undo.restore()
        self.graph, self.origin = last.graph, last.origin
        optim.assert_live(self.model, self.optimizers)
        return last.edit

    def check_held(self, n_latest: int) -> None:
        """Refuse to go back further than can be gone.

        Raises:
            EditError: fewer edits stand, or what they replaced is not in memory any more.
        """
        n_held = sum(applied.undo is not None for applied in self.applied)
        if n_latest <= n_held:
            return
        if not self.applied:
            raise EditError("There is no edit to undo.")
        if n_latest > len(self.applied):
            raise EditError(
                f"{n_latest} edits are to be taken back, and {len(self.applied)} stand.",
                remedy=f"Ask for {len(self.applied)} at most.",
            )
        raise EditError(
            f"{n_latest} edits are to be taken back; what they replaced is in memory for the latest {n_held} alone.",
            remedy="The ledger holds all: weightfold ledger undo RUN, or rebuild and take_back of weightfold.replay.",
        )

    def unfold(self, n_edits: int) -> list[Edit]:
        """Take the latest edits back, keeping what was trained since."""
        self.touched = True
        edits = []
        for _ in range(n_edits):
            last = self.applied.pop()
            assert last.undo is not None
            self._forget_newer_state(last.undo, all_new=False)
            unfold_undo(last.graph, last.edit, last.undo, (*self.optimizers, *self.own))
            self.graph, self.origin = last.graph, last.origin
            edits.append(last.edit)
        self.journal.append(n_edits)
        return edits

    def _forget_newer_state(self, undo: Undo, *, all_new: bool) -> None:
        """Where optimisers had no state at the edit, what they have gathered since does not fit what comes back.

        Args:
            all_new: of every tensor that had none; else where none had, and of followers: the rest is unfolded.
        """
        model, tensors = undo.by_module()[0]
        if model is not self.model:
            return
        held = {(id(optimizer), name) for optimizer, _, name, _ in undo.optimizer}
        for optimizer in (*self.optimizers, *self.own):
            for name in tensors:
                unheld = (id(optimizer), name) not in held
                if not held or (unheld and (all_new or name in self.graph.followers)):
                    optimizer.state.pop(find_tensor(model, name)[2], None)

    def obey(self, journal: Sequence[Edit | int]) -> None:
        """Do what another process did."""
        for what in journal:
            if isinstance(what, int):
                self.unfold(what)
            else:
                self.keep(what, *self.attempt(what))

    def state(self, n_watched: int) -> dict[str, Any]:
        """The edits so far, and what the latest replaced, as plain data and tensors."""
        maps: dict[str, Tensor] = {}

        def put(data: bytes) -> str:
            maps[str(len(maps))] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return str(len(maps) - 1)

        watched = self.applied[len(self.applied) - n_watched :]
        return {
            "edits": [applied.edit.to_record(put) for applied in self.applied],
            "maps": maps,
            "undo": [a.undo.to_state(self.averaged) for a in watched if a.undo is not None],
            "rises": [applied.rise for applied in self.applied],
            "shapes": {name: list(shape) for name, shape in without_followers(self.graph).shapes.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Bring a network of the first structure to that of an interrupted run.

        Raises:
            EditError: the network was edited already, or is not the one that the run started with.
        """
        if self.applied:
            raise EditError("The network was edited already.", remedy="Load into a freshly built and prepared one.")
        maps = state["maps"]
        self.obey([Edit.from_record(record, lambda key: maps[key].numpy().tobytes()) for record in state["edits"]])
        self.take_rises(state.get("rises", [0.0] * len(self.applied)))
        self._check_shapes(state["shapes"])

    def load_undo(self, state: Mapping[str, Any]) -> None:
        """Take up what the watched edits replaced, once all that they reached is there again."""
        undos = state["undo"]
        watched = self.applied[len(self.applied) - len(undos) :]
        attributes = [[] if applied.undo is None else applied.undo.attributes for applied in watched]
        self.forget(0)
        for applied, undo, sizes in zip(watched, undos, attributes, strict=True):
            applied.undo = Undo.from_state(undo, self.model, (*self.optimizers, *self.own), self.averaged)
            applied.undo.attributes = sizes

    def _check_shapes(self, expected: Mapping[str, Any]) -> None:
        found = {name: list(shape) for name, shape in self.graph.shapes.items()}
        if found != {name: list(shape) for name, shape in expected.items()}:
            name = next(n for n in found if found[n] != list(expected.get(n, [])))
            raise EditError(
                f"'{name}' has shape {found[name]} after the recorded edits, {expected.get(name)} in the checkpoint.",
                remedy="Build the model with the settings that the run started with.",
            )


def _own(companion: Companion) -> Companion:
    """The averaged module itself, whatever was wrapped around the network when it was copied."""
    if isinstance(companion, AveragedModel):
        companion = companion.module
    return unwrapped(companion) if isinstance(companion, nn.Module) else companion


def fits(model: nn.Module, graph: ChannelGraph) -> bool:
    """Whether a network has the shapes of its graph."""
    try:
        check_shapes(model, graph)
    except EditError:
        return False
    return True


CHANGED = "The model changed after it was prepared: build a new Compressor and prepare it."


OTHER_AVERAGE = "Pass an average of the model that is compressed, made when it had the shapes that it has now."


def check_shapes(model: nn.Module, graph: ChannelGraph, remedy: str = CHANGED) -> None:
    """Refuse a network that someone else has changed.

    Raises:
        EditError: names the tensor, and both shapes.
    """
    for name, expected in graph.shapes.items():
        found = tuple(find_tensor(model, name)[2].shape)
        if found != tuple(expected):
            raise EditError(
                f"'{name}' has shape {found}; the graph expects {tuple(expected)}.",
                remedy=remedy,
            )
