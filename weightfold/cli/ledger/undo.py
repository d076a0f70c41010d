"""`weightfold ledger undo`: take edits of a finished run back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Folder, Maker


@guarded
def undo(
    run: Folder,
    seq: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Take back every edit down to entry N; only the latest by default."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the network here and leave the run as it is.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over FILE; without --out over the run's own model, and record it.")
    ] = False,
    model: Maker = None,
    as_json: Json = False,
) -> None:
    """Write the network with its latest edit, or all edits down to one, taken back."""
    from weightfold.report import write_report
    from weightfold.training.again import undo_run

    facts = undo_run(run, seq=seq, out=out, force=force, maker=model, after=write_report)
    if as_json:
        show.print_json(facts)
        return
    console = show.console()
    for item in facts["undone"]:
        before, after = item["channels"]
        how = "[green]bit for bit[/]" if item["exact"] else "with what was trained since"
        console.print(f"entry {item['seq']}  {show.plain(item['group'])} {before} → {after}, {how}")
    before, after = facts["parameters"]
    console.print(f"model    {show.plain(facts['file'])}, {before:,} → {after:,} parameters", soft_wrap=True)
    if out is None:
        console.print(f"ledger   an entry 'undo' was added; head {facts['head'][:16]}")
        console.print("[dim]Scores in run.json and on the report's page were measured before.[/]")
