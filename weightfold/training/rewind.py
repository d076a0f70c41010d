"""Cut a ledger back to a checkpoint.

A ledger is append-only, and a run that was killed has written entries after its last checkpoint. The run does those
steps again and writes the same entries again; so it goes on in a copy that ends at the checkpoint.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from weightfold.artifact import drafting
from weightfold.errors import LedgerError
from weightfold.ledger import Ledger, lines
from weightfold.ledger.audit import read_blobs, read_metrics

_BESIDE = ("-wal", "-shm")


def rewind(path: Path, n_entries: int, last_step: int) -> None:
    """Leave the first entries, the metrics up to a step, and all blobs; the hashes of what is left stay the same.

    Args:
        path: the ledger.
        n_entries: entries to leave, > 0.
        last_step: metrics of later steps are dropped.
    Raises:
        LedgerError: the ledger is damaged, or holds fewer entries than the checkpoint has seen.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Ledger.create(f"{folder}/a.db", run={"seed": 0}) as ledger:
        ...         head = ledger.head
        ...         _ = ledger.append("edit", {"n": 1})
        ...     rewind(Path(folder, "a.db"), 1, 0)
        ...     with Ledger.open(f"{folder}/a.db") as ledger:
        ...         ledger.head == head
        True
    """
    copy, jsonl = (path.with_name(f"{path.name}.rewind{end}") for end in ("", ".jsonl"))
    with Ledger.open(path) as ledger:
        if len(ledger) < n_entries:
            raise LedgerError(
                f"'{path}' holds {len(ledger)} entries; the checkpoint has seen {n_entries}.",
                remedy="Put the run's own ledger back, or start the run anew with --force.",
            )
        if len(ledger) == n_entries and all(step <= last_step for step in _steps(ledger)):
            return
        beside = [copy.with_name(copy.name + suffix) for suffix in _BESIDE]
        _remove(copy, jsonl, *beside)  # of a process that was killed here
        try:
            with drafting(jsonl) as draft, draft.open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(_lines(ledger, n_entries, last_step))
            Ledger.import_jsonl(jsonl, copy).close()
        finally:
            _remove(jsonl)
        # All is in the file itself before its journal goes: until the copy takes its place it is whole.
        ledger._query("PRAGMA wal_checkpoint(TRUNCATE)")
    _remove(*(path.with_name(path.name + suffix) for suffix in _BESIDE))
    copy.replace(path)
    _remove(*beside)


def _remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _steps(ledger: Ledger) -> itertools.chain[int]:
    return itertools.chain.from_iterable((step for step, _ in ledger.metrics(name)) for name in ledger.metric_names())


def _lines(ledger: Ledger, n_entries: int, last_step: int) -> list[str]:
    metrics = (row for row in read_metrics(ledger._query, ledger.path) if row.step <= last_step)
    entries = itertools.islice(ledger.entries(), n_entries)
    return list(lines.dump(entries, metrics, read_blobs(ledger._query, ledger.path)))
