"""What a ledger tells: what became of each channel, how two runs differ, whether a run's folder is whole. No torch."""

from weightfold.audit.explain import explain
from weightfold.audit.history import Change, History, read_history

__all__ = ["Change", "History", "explain", "read_history"]
