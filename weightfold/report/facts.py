"""Gather what a report says from the files of a run: `run.json` and the ledger. Nothing is computed anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightfold.audit.bits import Bits, bits_of
from weightfold.audit.history import history_of
from weightfold.audit.timeline import Timeline, read_timeline
from weightfold.errors import ArtifactError
from weightfold.ledger import Ledger

ARMS = ("dense", "folded")
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One measured quantity of one network.

    Args:
        arm: "dense" or "folded".
        by_step: (step, value).
        by_seconds: (seconds of training, value).
    """

    arm: str
    by_step: Points
    by_seconds: Points


@dataclass(frozen=True)
class Attempt:
    """A size that an edit was tried at.

    Args:
        kept: channels it would leave.
        mean: measured change of the loss, None if it was not measured.
        upper: upper end of its interval.
        reason: why it was taken back; "" if it was kept.
    """

    kept: int
    mean: float | None
    upper: float | None
    reason: str


@dataclass(frozen=True)
class Decision:
    """One proposed edit and what became of it.

    Args:
        seq: number of the ledger's entry.
        dropped: what went, and the kept channel most like it: plain records with channel, partner, correlation.
        rejected: other choices and their predicted price.
        parameters: of the network afterwards, None if the edit was taken back.
        undone: entry that took it back later; None while it stands.
    """

    seq: int
    hash: str
    step: int
    group: str
    kind: str
    accepted: bool
    before: int
    after: int
    predicted: float | None
    attempts: list[Attempt]
    reason: str = ""
    metric: str = ""
    unit: str = ""
    numbering: str = ""
    original: list[int] = field(default_factory=list)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    parameters: int | None = None
    macs: int | None = None
    undone: int | None = None


@dataclass(frozen=True)
class Facts:
    """All that a report says."""

    run: dict[str, Any]
    decisions: list[Decision]
    losses: list[Curve]
    scores: list[Curve]
    timeline: Timeline
    plans: list[tuple[dict[str, Any], dict[str, Any]]]
    entries: int
    head: str
    bits: Bits | None = None

    @property
    def results(self) -> dict[str, Any]:
        """Results of the run."""
        return self.run["results"]

    @property
    def arms(self) -> list[str]:
        """Names of the networks, in order."""
        return [name for name in ARMS if name in self.results["arms"]]


def gather(folder: Path) -> Facts:
    """Read the files of a finished run.

    Raises:
        ArtifactError: `run.json` is missing or damaged, or the run is not finished.
        LedgerError: the ledger is missing or damaged.
    """
    run = _read_run(folder / "run.json")
    with Ledger.open(folder / "ledger.db", readonly=True) as ledger:
        return Facts(
            run,
            list(_decisions(ledger)),
            [curve for arm in ARMS if (curve := _curve(ledger, arm, "loss", "seconds")).by_step],
            [curve for arm in ARMS if (curve := _curve(ledger, arm, "val_score", "val_seconds")).by_step],
            read_timeline(folder),
            [(entry.body, entry.aside) for entry in ledger.entries() if "candidates" in entry.body],
            len(ledger),
            ledger.head,
            bits_of(ledger),
        )


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}", remedy="Pass the folder of a finished run.") from None
    if not isinstance(run, dict) or "results" not in run:
        raise ArtifactError(
            f"The run in '{path.parent}' is not finished.",
            remedy=f"Go on with it: weightfold train --resume {path.parent}",
        )
    return run


def _curve(ledger: Ledger, arm: str, name: str, clock: str) -> Curve:
    values, seconds = ledger.metrics(f"{arm}/{name}"), dict(ledger.metrics(f"{arm}/{clock}"))
    by_step: Points = [(float(step), value) for step, value in values]
    return Curve(arm, by_step, [(seconds[step], value) for step, value in values if step in seconds])


def _decisions(ledger: Ledger) -> Iterator[Decision]:
    widths: dict[str, int] = {}
    entries = tuple(ledger.entries())
    undone = {change.seq: change.undone for change in history_of(entries, ledger.path, ledger.head).changes}
    for entry in entries:
        body = entry.body
        if entry.kind == "prepare":
            widths = {group[0]: group[2] for group in body["groups"]}
        elif entry.kind == "edit":
            if entry.seq in undone:
                later = undone[entry.seq]
                yield replace(_edit(entry.seq, entry.hash, body), undone=None if later is None else later.seq)
        elif entry.kind == "rollback":
            attempts = _attempts(body["attempts"])
            n = widths.get(body["group"], 0)
            predicted = _number(body["attempts"][0].get("predicted"))
            common = (body["step"], body["group"], body["method"], False, n, n, predicted, attempts)
            yield Decision(entry.seq, entry.hash, *common, reason=attempts[-1].reason)
        elif entry.kind == "refusal":
            reason = str(entry.aside.get("why") or body["why"]).partition("\n")[0]
            together = body.get("groups", [])
            group = f"{len(together)} groups at once" if together else ""
            yield Decision(entry.seq, entry.hash, body["step"], group, body["method"], False, 0, 0, None, [], reason)


def _edit(seq: int, digest: str, body: dict[str, Any]) -> Decision:
    what, why, edit = body["what"], body["why"], body["what"]["edit"]
    order = sorted(what["kept"] + what["removed"])
    return Decision(
        seq,
        digest,
        body["step"],
        what["group"],
        edit["kind"],
        True,
        edit["channels"],
        len(edit["carry"]),
        _number(body["price"]["predicted"]),
        _attempts(body["price"]["attempts"]),
        metric=str(why.get("metric", "")),
        unit=str(why.get("unit", "")),
        numbering=what["numbering"],
        original=order if len(order) == edit["channels"] else list(range(edit["channels"])),
        dropped=[item for item in why.get("dropped", []) if isinstance(item, dict)],
        rejected=[item for item in why.get("rejected", []) if isinstance(item, dict)],
        parameters=body["gain"].get("parameters"),
        macs=body["gain"].get("macs"),
    )


def _attempts(records: list[dict[str, Any]]) -> list[Attempt]:
    return [
        Attempt(int(r["kept"]), _number(r.get("mean")), _number(r.get("upper")), str(r.get("reason", "")))
        for r in records
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
