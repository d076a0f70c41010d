"""The record of a run: what was changed, when, why and at what cost, in one append-only file that can be checked."""

from weightfold.ledger.entry import Entry
from weightfold.ledger.log import Ledger

__all__ = ["Entry", "Ledger"]
