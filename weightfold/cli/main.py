"""The command line: `weightfold COMMAND`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from weightfold.cli import (
    bench,
    canon,
    diff,
    export,
    fold,
    inspect,
    ledger,
    lump,
    merge,
    same,
    sharing,
    trace,
    train,
    tune,
    zoo,
)

app = typer.Typer(
    name="weightfold",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Networks that find what they hold twice, and fold it away while they train.",
)
app.command("trace")(trace.trace)
app.command("sharing")(sharing.sharing)
app.command("train")(train.train)
app.command("fold")(fold.fold)
app.command("lump")(lump.lump)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
app.command("inspect")(inspect.inspect)
app.command("canon")(canon.canon)
app.command("same")(same.same)
app.command("diff")(diff.diff)
app.command("merge")(merge.merge)
app.add_typer(ledger.app, name="ledger")
app.add_typer(zoo.app, name="zoo")


def _show_version(wanted: bool) -> None:
    if wanted:
        from weightfold import __version__

        typer.echo(f"weightfold {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Networks that find what they hold twice, and fold it away while they train."""


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
