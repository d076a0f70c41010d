"""`weightfold ledger`: the record of a run, one verb a file. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import typer

from weightfold.cli.ledger import diff, explain, show, verify

app = typer.Typer(no_args_is_help=True, help="Read the record of a run, check it, replay it, take edits back.")
app.command("show")(show.show_entries)
app.command("explain")(explain.explain)
app.command("verify")(verify.verify)
app.command("diff")(diff.diff)
