"""`weightfold fold`: make a trained network smaller at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded


@guarded
def fold(
    model: Annotated[
        str, typer.Argument(help="Built-in name, package.module:function, saved model, or folder of a run.")
    ],
    data: Annotated[
        str, typer.Option(metavar="PATH", help="'digits', a file or a folder; labels are only for scores.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Trained weights of the model.")] = None,
    keep: Annotated[float | None, typer.Option(help="Share of the channels to keep.", show_default="0.7")] = None,
    macs: Annotated[float | None, typer.Option(help="Share of the multiply-accumulates to keep, instead.")] = None,
    tuned: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep to widths that weightfold tune found quick; never slower.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Unlabelled inputs to look at.")] = 1024,
    max_increase: Annotated[
        float | None, typer.Option(help="Take back edits that raise the loss by more; looks at labels.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of inputs.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over the run in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Fold a trained network once, by unlabelled inputs, without training; then compare it with what it was."""
    from weightfold.errors import ConfigError

    if keep is not None and macs is not None:
        raise ConfigError("--keep and --macs say the same in two ways.", remedy="Leave out one.")
    from weightfold.report import write_report
    from weightfold.training.oneshot import OneShotConfig, fold_trained

    config = OneShotConfig(
        model=model,
        weights=None if weights is None else str(weights),
        data=data,
        keep=keep,
        macs=macs,
        tuned=None if tuned is None else str(tuned),
        samples=samples,
        max_increase=max_increase,
        seed=seed,
    )
    run = fold_trained(config, out, force=force, after=write_report)
    if as_json:
        show.print_json({"out": str(out), **run})
        return
    print_run(out, run)


def print_run(out: Path, run: dict[str, Any]) -> None:
    """Print the network before and after."""
    from weightfold.cli.train import remarks
    from weightfold.training.result import comparison

    results = run["results"]
    rows = [
        [
            row["name"],
            show.quantity(row["dense"], row["unit"]),
            show.quantity(row["folded"], row["unit"]),
            show.change(row),
        ]
        for row in comparison(results)
        if row["key"] != "seconds"
    ]
    title = f"{run['config']['model']} on {run['data']['name']}, folded at once in {results['seconds']:.1f} s"
    show.table(("", "before", "after", "change"), rows, right=(1, 2, 3), title=title)
    console = show.console()
    for line in remarks(results):
        console.print(line)
    console.print()
    console.print(f"report  {out / 'report.html'}")
    console.print(f"model   {out / 'model.safetensors'}")
    console.print(f"ledger  {out / 'ledger.db'}, {results['entries']} entries, head {results['head'][:16]}")
