"""Keep a zoo's models as differences to each other where that is smaller.

1. **Candidates.** Models of one architecture that lie nearest by embedding, and the parent that a card declares.
2. **Costs.** Each pair is aligned once (`matching`); how far the weights are apart tells what the difference will take.
3. **Forest** (`forest`): who is whose parent, no chain longer than a limit.
4. **Switch**, parents before children: encode, decode, compare bit for bit (or with what a lossy difference is to
   give), one transaction a model. Whoever is killed on the way leaves a zoo in which some models are packed and every
   one is whole; packing again goes on. Who changes a model meanwhile wins: it is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from weightfold.errors import ArtifactError, ConfigError, WeightfoldError
from weightfold.fingerprint import digest as digest_of
from weightfold.weights.compare import differences
from weightfold.zoo.cache import Cache
from weightfold.zoo.delta.codec import decode, encode, estimate
from weightfold.zoo.delta.matching import match
from weightfold.zoo.delta.moves import Alignment
from weightfold.zoo.delta.steps import Lossy, change_of, largest_step
from weightfold.zoo.distance import neighbours, relative_distance
from weightfold.zoo.find.embed import embedding
from weightfold.zoo.forest import forest
from weightfold.zoo.storage.catalogue import MAX_DEPTH
from weightfold.zoo.store import Zoo

State = Mapping[str, Tensor]
Progress = Callable[[int, int, str], None]
DEPTH = 8
CANDIDATES = 6
CACHE_BYTES = 1 << 28
WORTH = 0.9
"""A difference must be smaller than this share of what the model's own tensors take, coded alone."""
NO_RELATIVE = "no relative near enough to save space"
NEAR = 0.1
"""Relative distance below which models are taken to stand in one order as they are."""


@dataclass(frozen=True)
class Row:
    """What packing does, or would do, with one content.

    Args:
        name: of a model of this content.
        parent: name of the model that it is a difference to; None if it stays in full.
        before, after: bytes of the blob.
        moved: whether the parent's channels are permuted, flipped or rescaled first.
        step: of a lossy difference, absolute; None if it is exact.
        change: what the lossy difference changes, as `Lossy.change` measures it, or else relative to the weights' norm.
        note: why it stays in full, or what differs.
    """

    name: str
    parent: str | None
    before: int
    after: int
    moved: bool = False
    step: float | None = None
    change: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Packed:
    """What was done: a row for each content that was looked at, and bytes of all blobs of the zoo."""

    rows: tuple[Row, ...]
    before: int
    after: int

    @property
    def n_packed(self) -> int:
        """Contents that became differences."""
        return sum(row.parent is not None for row in self.rows)


def pack(
    zoo: Zoo,
    *,
    lossy: Lossy | None = None,
    models: Sequence[str] = (),
    depth: int = DEPTH,
    plan: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Keep models as differences to others where that takes fewer bytes.

    Args:
        zoo: open for writing; others may use it at the same time.
        lossy: None for differences that give every model back to the bit.
        models: names; all by default. Models that are differences already stay as they are.
        depth: most differences in a chain, 1 to 16: what reading a model may cost.
        plan: only say what would be gained. Children of models that would be packed lossily are estimated from those as
            they are.
        progress: called with what is done, what there is to do, and a name.
    Raises:
        ConfigError: the depth is out of range, or there is no such model.
    Example:
        >>> import tempfile, torch
        >>> parent = {"w": torch.randn(64, 64, generator=torch.Generator().manual_seed(0))}
        >>> child = {"w": parent["w"] + torch.eye(64)}
        >>> with tempfile.TemporaryDirectory() as folder, Zoo.open(f"{folder}/zoo") as zoo:
        ...     _ = zoo.add(parent, name="base"), zoo.add(child, name="tuned")
        ...     done = pack(zoo)
        ...     done.n_packed, done.after < 0.6 * done.before, torch.equal(zoo.state("tuned")["w"], child["w"])
        (1, True, True)
    """
    if not 1 <= depth <= MAX_DEPTH:
        raise ConfigError(f"The depth must lie between 1 and {MAX_DEPTH}. Got {depth} instead.")
    return _Packing(zoo, lossy, depth, plan, progress or _ignore).run(models)


def _ignore(done: int, total: int, remark: str) -> None:
    """Show nothing."""


class _Packing:
    """One run over a zoo."""

    def __init__(self, zoo: Zoo, lossy: Lossy | None, depth: int, plan: bool, progress: Progress) -> None:
        self._zoo, self._lossy, self._depth, self._plan, self._progress = zoo, lossy, depth, plan, progress
        self._states: Cache[str, State] = Cache(CACHE_BYTES, least=2)
        cards = zoo.cards()
        self._cards = {card.digest: card for card in reversed(cards)}
        self._notes: dict[str, str] = {}
        self._own: dict[str, float] = {}

    def run(self, models: Sequence[str]) -> Packed:
        before = sum(card.stored_bytes for card in self._cards.values())
        wanted = {self._zoo.card(name).digest for name in models} or set(self._cards)
        above = {card.base for card in self._cards.values() if card.base is not None}
        todo = [d for d in self._cards if d in wanted and self._cards[d].is_full and d not in above]
        rows = [self._row(digest, None, note="others are differences to it") for digest in above & wanted]
        parents = self._forest(set(todo))
        rows += [self._row(digest, None, note=self._why(digest, parents)) for digest in todo if digest not in parents]
        for i, (child, parent) in enumerate(parents.items()):
            self._progress(i, len(parents), self._cards[child].name)
            rows.append(self._switch(child, parent))
        if not self._plan:
            self._zoo.sweep()
        saved = sum(row.before - row.after for row in rows)
        return Packed(tuple(sorted(rows, key=lambda row: (row.parent is None, row.name))), before, before - saved)

    # candidates -------------------------------------------------------------------------------------------------------

    def _forest(self, todo: set[str]) -> dict[str, str]:
        """The parent of each content that is to become a difference, parents before children."""
        fixed = {d: self._level(d) for d in self._cards if d not in todo}
        wished = {d: p for d in todo if (p := self._declared(d)) is not None}
        pairs = list(self._pairs(todo, wished))
        costs: dict[tuple[str, str], float] = {}
        for i, (one, two) in enumerate(pairs):
            self._progress(i, len(pairs), f"aligning {self._cards[one].name}")
            costs[one, two] = self._cost(one, two)
        named = {d for pair in costs for d in pair if d in todo}
        full = {d: WORTH * self._alone(d) if d in named else 0.0 for d in self._cards}
        return forest(full, costs, depth=self._depth, fixed=fixed, wished=wished)

    def _alone(self, digest: str) -> float:
        """What a content would take without a parent; a stranger as a parent saves nothing beyond that."""
        if digest not in self._own:
            coded = len(encode(self._state(digest), {}))
            self._own[digest] = min(coded, self._cards[digest].stored_bytes)
        return self._own[digest]

    def _level(self, digest: str) -> int:
        """How many differences lie above a content as it is."""
        level, base = 0, self._cards[digest].base
        while base is not None and base in self._cards and level <= MAX_DEPTH:
            level, base = level + 1, self._cards[base].base
        return level

    def _declared(self, digest: str) -> str | None:
        parent = self._cards[digest].parent
        try:
            found = None if parent is None else self._zoo.card(parent).digest
        except ConfigError:
            return None
        return found if found in self._cards and found != digest else None

    def _pairs(self, todo: set[str], wished: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Pairs that are worth a look: the declared parent, and the nearest of the same architecture."""
        seen = set()
        groups: dict[tuple[str | None, int], list[str]] = {}
        for digest, card in self._cards.items():
            groups.setdefault((card.architecture, card.n_parameters), []).append(digest)
        for members in groups.values():
            few = len(members) <= CANDIDATES + 1
            near = [range(len(members))] * len(members) if few else neighbours(self._places(members), CANDIDATES)
            for i, digest in enumerate(members):
                options = [members[j] for j in near[i] if j != i] if digest in todo else []
                options += [wished[digest]] if digest in wished else []
                for other in options:
                    pair = (min(digest, other), max(digest, other))
                    if pair not in seen:
                        seen.add(pair)
                        yield pair

    def _places(self, members: Sequence[str]) -> np.ndarray:
        """Embeddings, shape (n, 256); worked out where a card has none."""
        found = []
        for digest in members:
            known = self._cards[digest].embedding
            found.append(embedding(self._state(digest)) if known is None else known)
        return np.stack(found).astype(np.float32)

    def _cost(self, one: str, two: str) -> float:
        try:
            child, parent = self._state(one), self._state(two)
            step = self._lossy.step if self._lossy is not None and not self._lossy.relative else None
            return estimate(child, parent, moves=self._moves(one, child, parent), step=step)
        except WeightfoldError as error:
            self._notes[one] = error.message
            return float("inf")

    def _moves(self, one: str, child: State, parent: State) -> Alignment:
        """What brings a parent to its child; nothing where they are near already, or no symmetries are known."""
        found = self._zoo.symmetries(self._cards[one].name)
        if found is None or relative_distance(child, parent) < NEAR:
            return Alignment()
        return match(found, child, parent)

    def _state(self, digest: str) -> State:
        """A content as reading gives it, kept for a while."""
        held = self._states.get(digest)
        return self._states.put(digest, self._zoo.state(self._cards[digest].name)) if held is None else held

    def _why(self, digest: str, parents: Mapping[str, str]) -> str:
        """Why a content stays in full."""
        if digest in parents.values():
            return "others are differences to it"
        declared = self._declared(digest)
        if declared is not None and (unlike := differences(self._shapes(declared), self._shapes(digest))):
            return f"its parent '{self._cards[declared].name}' is of another architecture: {unlike[0]}"
        return NO_RELATIVE

    def _shapes(self, digest: str) -> dict[str, Tensor]:
        return dict(self._state(digest))

    # switching --------------------------------------------------------------------------------------------------------

    def _row(self, digest: str, parent: str | None, **values: object) -> Row:
        card = self._cards[digest]
        name = None if parent is None else self._cards[parent].name
        note = self._notes.get(digest, "")
        return Row(card.name, name, card.stored_bytes, **{"after": card.stored_bytes, "note": note, **values})  # type: ignore[arg-type]

    def _switch(self, digest: str, parent: str) -> Row:
        """Encode one content, compare, and keep it so if it is smaller."""
        try:
            return self._switched(digest, parent)
        except WeightfoldError as error:
            return self._row(digest, None, note=error.message)

    def _switched(self, digest: str, parent: str) -> Row:
        child, base = self._state(digest), self._state(parent)
        moves = self._moves(digest, child, base)
        step, relative, carry, note = None, False, False, "; ".join(differences(base, child)[:1])  # type: ignore[arg-type]
        if self._lossy is not None:
            step, relative, carry = self._lossy.step, self._lossy.relative, self._lossy.carry
            if step is None:
                step, relative = largest_step(child, base, moves, self._lossy), False
                note = note or ("no step keeps the bound: exact" if step is None else "")
        data = encode(child, base, moves=moves, step=step, relative=relative, carry=carry)
        decoded = decode(data, base)
        found = digest_of(decoded)
        if step is None and found != digest:
            raise ArtifactError("decoding does not give the model back: kept in full.")
        if len(data) > WORTH * self._alone(digest):
            return self._row(digest, None, note=note or NO_RELATIVE)
        exact = found == digest
        if not self._plan:
            self._zoo.switch(digest, blob=data, parent=parent, lossy=not exact, decoded=found)
            self._states.put(digest, decoded)
        change = None if exact else change_of(child, decoded, self._lossy)
        return self._row(
            digest, parent, after=len(data), moved=bool(moves), step=None if exact else step, change=change, note=note
        )
