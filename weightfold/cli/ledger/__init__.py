"""`weightfold ledger`: the record of a run, one verb a file. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

from weightfold.cli.ledger import diff, explain, replay, show, timeline, undo, verify

app = typer.Typer(no_args_is_help=True, help="Read the record of a run, check it, replay it, take edits back.")
app.command("show")(show.show_entries)
app.command("explain")(explain.explain)
app.command("timeline")(timeline.timeline)
app.command("verify")(verify.verify)
app.command("replay")(replay.replay)
app.command("undo")(undo.undo)
app.command("diff")(diff.diff)
