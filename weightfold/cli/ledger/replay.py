"""`weightfold ledger replay`: the original and the ledger give the same result, or the first difference."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Folder, Maker


@guarded
def replay(
    run: Folder,
    train: Annotated[
        bool, typer.Option("--train", help="Repeat the training too, with the recorded decisions forced.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --train: keep the new run in this folder.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="With --train: threads of torch; those of the run by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="With --train: cpu or cuda; that of the run by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the run that --out holds.")] = False,
    model: Maker = None,
    as_json: Json = False,
) -> None:
    """Apply the recorded edits to the original network, and compare. Exit code 1 if the structure is another."""
    if train:
        facts = _train(run, out, threads, device, model, force=force, quiet=as_json)
    else:
        _refuse(out=out, threads=threads, device=device)
        from weightfold.training.again import rebuild_run

        facts = rebuild_run(run, maker=model)
    if as_json:
        show.print_json(facts)
    else:
        _print(facts, trained=train)
    if not facts["same_structure"]:
        raise typer.Exit(1)


def _refuse(**options: Any) -> None:
    """Options that mean nothing without a training."""
    from weightfold.errors import ConfigError

    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name} means something with --train only.", remedy=f"Add --train, or leave out --{name}."
            )


def _train(
    run: Path,
    out: Path | None,
    threads: int | None,
    device: str | None,
    model: str | None,
    *,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    from weightfold.report import write_report
    from weightfold.training.again import train_again

    with (
        tempfile.TemporaryDirectory(prefix="weightfold-") as scratch,
        show.progress("replaying", quiet=quiet) as update,
    ):
        return train_again(
            run,
            out or Path(scratch, "run"),
            threads=threads,
            device=device,
            maker=model,
            force=force,
            progress=lambda done, total, _: update(done, total, ""),
            after=None if out is None else write_report,
        )


def _print(facts: Mapping[str, Any], *, trained: bool) -> None:
    console = show.console()
    n = facts["edits"]
    edits = f"{n} recorded edit{'' if n == 1 else 's'} {'forced in training' if trained else 'applied to the original'}"
    console.print(f"{_verdict(facts['same_structure'])}  structure, after {edits}")
    if facts["same_weights"] is not None:
        console.print(f"{_verdict(facts['same_weights'])}  weights")
    if not facts["same_start"]:
        console.print("[yellow]other[/]  initial weights than the recorded ones")
    if trained:
        score, other = facts["scores"]
        console.print(f"       test score {score:.4f} then, {other:.4f} now", soft_wrap=True)
        for what in ("threads", "devices"):
            then, now = facts[what]
            if then != now:
                console.print(f"       {what} {then} then, {now} now")
    difference = facts["first_difference"]
    if difference is not None:
        text = difference if isinstance(difference, str) else difference["text"]
        console.print(f"First difference: {show.plain(text)}", soft_wrap=True)
    for seq, kind in facts.get("unknown", []):
        console.print(f"[yellow]not replayed[/]  entry {seq} of kind {show.plain(kind)}")


def _verdict(same: bool) -> str:
    return "[green]same[/]" if same else "[red]other[/]"
