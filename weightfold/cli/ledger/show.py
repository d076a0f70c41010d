"""`weightfold ledger show`: list the entries."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Source, marked, signed, summary


@guarded
def show_entries(
    source: Source,
    group: Annotated[str | None, typer.Option(help="Only entries about this channel group.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind: edit, rollback, undo, ...")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last N entries.", metavar="N")] = None,
    as_json: Json = False,
) -> None:
    """List what was changed, when, at what cost, and what was refused."""
    from weightfold.audit.history import group_of, ledger_file
    from weightfold.ledger import Ledger

    with Ledger.open(ledger_file(source), readonly=True) as ledger:
        everything, head, path = list(ledger.entries()), ledger.head, ledger.path
    _check_known("the group", group, {group_of(entry.body) for entry in everything} - {""}, path)
    _check_known("the kind", kind, {entry.kind for entry in everything}, path)
    entries = [
        entry
        for entry in everything
        if (group is None or group_of(entry.body) == group) and (kind is None or entry.kind == kind)
    ]
    entries = entries[-last:] if last else entries
    if as_json:
        show.print_json([_record(entry) for entry in entries])
        return
    columns = ("seq", "kind", "group", "channels", "predicted", "measured", "hash", "")
    show.table(columns, [_row(entry) for entry in entries], right=(0, 3, 4, 5))
    show.console().print(f"head {head}")


def _check_known(what: str, wanted: str | None, known: set[str], path: Any) -> None:
    if wanted is None or wanted in known:
        return
    from weightfold.config import nearest
    from weightfold.errors import ConfigError

    remedy = nearest(wanted, known) if known else "It names none at all."
    raise ConfigError(f"No entry of '{path}' is about {what} '{wanted}'.", remedy=remedy)


def _record(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("seq", "kind", "time", "body", "aside", "prev", "hash")}


def _row(entry: Any) -> list[str]:
    facts = summary(entry.kind, entry.body, entry.aside)
    return [
        str(entry.seq),
        marked(entry.kind),
        show.plain(facts["group"]),
        facts["channels"],
        "" if facts["predicted"] is None else f"{facts['predicted']:.2g}",
        "" if facts["measured"] is None else signed(facts["measured"]),
        entry.hash[:12],
        show.plain(facts["remark"]),
    ]
