"""`weightfold zoo verify`: read everything, and say what is wrong."""

from __future__ import annotations

from typing import Annotated

import typer

from weightfold.cli import show
from weightfold.cli.door import WRONG, Json, complain, guarded
from weightfold.cli.zoo.common import Folder, size


@guarded
def verify(
    zoo: Folder,
    sweep: Annotated[bool, typer.Option("--sweep", help="Delete blobs that nothing needs any more.")] = False,
    as_json: Json = False,
) -> None:
    """Read every model and compare it with its digest; exit code 2 if something is wrong."""
    from dataclasses import asdict

    from weightfold.zoo.store import Zoo

    with Zoo.open(zoo, create=False) as opened:
        with show.progress("verifying", quiet=as_json) as update:
            problems = opened.verify(update)
        count = len(opened)
        swept = opened.sweep() if sweep else None
    if as_json:
        facts = {"models": count, "valid": not problems, "problems": [asdict(problem) for problem in problems]}
        show.print_json({**facts, "swept": None if swept is None else asdict(swept)})
    else:
        for problem in problems:
            whose = f"{', '.join(problem.names[:5])}: " if problem.names else ""
            complain(f"{whose}{problem.message}\n  -> {problem.remedy}")
        if not problems:
            show.console().print(f"[green]intact[/]  {count:,} models read, each with the digest it should have")
        if swept is not None:
            show.console().print(f"[green]swept[/]   {swept.n_files:,} files, {size(swept.n_bytes)}")
        elif sweep:
            show.console().print("[yellow]not swept[/]  others were at work all the time")
    if problems:
        raise typer.Exit(WRONG)
