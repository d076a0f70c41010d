"""What is written into the ledger of each edit that stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightfold.fingerprint import digest
from weightfold.graph.apply import find_tensor
from weightfold.history import undo_bytes
from weightfold.ledger import Ledger
from weightfold.size import macs, parameters
from weightfold.surgeon import Surgeon, Trial


@dataclass(frozen=True, eq=False)
class Book:
    """Writes into a ledger, or nothing where there is none.

    Args:
        ledger: None keeps no record.
        keep_undo: whether what each edit replaced is stored.
        example: one that the model takes, for counting multiply-accumulates.
        n_probe: batches of the probe.
    """

    ledger: Ledger | None
    keep_undo: bool
    example: Any
    n_probe: int

    def record(self, kind: str, body: Mapping[str, Any], aside: Mapping[str, Any] | None = None) -> None:
        """Append an entry; ``aside`` holds facts that a second run would not repeat."""
        if self.ledger is not None:
            self.ledger.append(kind, dict(body), aside=dict(aside or {}))

    def edit(
        self,
        hands: Surgeon,
        trial: Trial,
        what: Mapping[str, Any],
        attempts: Sequence[Mapping[str, Any]],
        head: Mapping[str, Any],
        seconds: float,
    ) -> None:
        """Write down an edit that stays.

        Args:
            what: who is kept and who goes.
            attempts: what was tried, the last of which is this.
            head: what the entry begins with: method and step.
        """
        if self.ledger is None:
            return
        proposal, edit, undo = trial.proposal, trial.edit, trial.undo
        group, followers = trial.before[edit.group], trial.before.followers
        blob = self.ledger.put_blob(undo_bytes(undo, followers)) if self.keep_undo else None
        names = list(dict.fromkeys(a.tensor for a in group.axes if a.tensor not in followers))
        rates = [g["lr"] for o in hands.optimizers for g in o.param_groups if isinstance(g["lr"], float)]
        body = {
            **head,
            "what": {**what, "edit": edit.to_record(self.ledger.put_blob)},
            "why": proposal.why,
            "price": {
                "predicted": proposal.predicted,
                "attempts": list(attempts),
                "probe_batches": self.n_probe,
                "risen": hands.spent,
            },
            "gain": {"parameters": parameters(hands.model), "macs": macs(hands.model, self.example)},
            "proof": {"weights": digest({n: find_tensor(hands.model, n)[2] for n in names}), "undo": blob},
            "reset": sorted(undo.reset),
        }
        self.record("edit", body, {"seconds": seconds, "learning_rates": rates})
