"""`weightfold train`: the main job."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded


class Optimizer(StrEnum):
    """Optimisers."""

    sgd = "sgd"
    adamw = "adamw"


class Method(StrEnum):
    """Methods, and none."""

    fold = "fold"
    prune = "prune"
    none = "none"


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ALONE = ("resume", "as_json", "debug")
"""Options that may come along with --resume."""


@guarded
def train(
    ctx: typer.Context,
    source: Annotated[str, typer.Argument(metavar="DATA", help="'digits', a file or a folder.")] = "digits",
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="The same as DATA.")] = None,
    model: Annotated[
        str, typer.Option(help="Built-in name, or package.module:function. auto: as the data asks for.")
    ] = "auto",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Setting of a built-in model: width=32.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training samples.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 32,
    lr: Annotated[float | None, typer.Option(help="First learning rate.", show_default="0.05, adamw 0.002")] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help="Optimiser.", show_default="as the model asks for")
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Shift images and text windows.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use at most this many samples.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and batches, the same for both networks.")] = 0,
    method: Annotated[Method, typer.Option(help="What makes the second network smaller.")] = Method.fold,
    keep: Annotated[float, typer.Option(help="Share of the channels to keep.")] = 0.5,
    at: Annotated[float, typer.Option(help="When to act, as a share of the steps.")] = 0.1,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Dial: fold as far as this costs; in place of keep and at.")
    ] = None,
    time_goal: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Dial: fold as far as this saves; in place of keep and at.")
    ] = None,
    max_increase: Annotated[float, typer.Option(help="Largest rise of the probe loss that is accepted.")] = 0.1,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Leave out the dense network.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/DATA")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the run in that folder.")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with an interrupted run.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    as_json: Json = False,
) -> None:
    """Train a dense network and, paired with it, one that folds itself while it trains; then compare the two."""
    if resume is not None:
        _refuse_others(ctx)
        _run(resume, None, as_json=as_json)
        return
    config = {
        "data": data or source,
        "limit": limit,
        "model": model,
        "overrides": parse_settings(settings or []),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "optimizer": optimizer.value if optimizer else "auto",
        "augment": augment,
        "seed": seed,
        "method": method.value,
        "keep": keep,
        "at": at,
        "max_accuracy_loss": max_accuracy_loss,
        "time_goal": time_goal,
        "max_increase": max_increase,
        "dense": not no_dense,
        "device": device.value,
        "threads": threads,
    }
    _run(out or Path("runs", Path(data or source).stem), config, force=force, as_json=as_json)


def _run(out: Path, config: dict[str, Any] | None, *, force: bool = False, as_json: bool) -> None:
    """Start a run, or go on with one if there is no config; write the report; print the comparison."""
    from weightfold.report import write_report
    from weightfold.training import TrainConfig
    from weightfold.training import resume as go_on
    from weightfold.training import train as start

    checked = None if config is None else TrainConfig(**config)
    try:
        with show.progress("training", quiet=as_json) as update:

            def tell(done: int, total: int, scores: dict[str, Any]) -> None:
                update(done, total, _remark(scores))

            run = go_on(out, progress=tell) if checked is None else start(checked, out, force=force, progress=tell)
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    write_report(out)
    if as_json:
        show.print_json({"out": str(out), **run})
        return
    print_run(out, run)


def _interrupted(out: Path) -> BaseException:
    from weightfold.cli.door import INTERRUPTED, complain

    resumable = (out / "run.json").exists()
    remedy = f"\n  -> Go on with: weightfold train --resume {out}" if resumable else ""
    complain(f"Interrupted; nothing half-written was left behind.{remedy}")
    return typer.Exit(INTERRUPTED)


def _refuse_others(ctx: typer.Context) -> None:
    """With --resume all settings come from the run."""
    from weightfold.errors import ConfigError

    for name in ctx.params:
        given = ctx.get_parameter_source(name)
        if name not in ALONE and given is not None and given.name == "COMMANDLINE":
            raise ConfigError(
                f"--resume takes all settings from the run; '{name.replace('_', '-')}' cannot be given with it.",
                remedy="Leave it out, or start a new run.",
            )


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE pairs; values are JSON, lists of numbers with commas, or text.

    Raises:
        ConfigError: a pair has no "=".
    Example:
        >>> parse_settings(["width=32", "hidden=64,32", "activation=tanh"])
        {'width': 32, 'hidden': [64, 32], 'activation': 'tanh'}
    """
    from weightfold.errors import ConfigError

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set takes NAME=VALUE. Got '{pair}' instead.", remedy="For example: --set width=32")
        found[name.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    import json

    if "," in text and not text.startswith("["):
        return [_value(part) for part in text.split(",") if part]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _remark(scores: dict[str, Any]) -> str:
    return "  ".join(f"{name} {facts['score']:.3f}" for name, facts in scores.items())


def print_run(out: Path, run: dict[str, Any]) -> None:
    """Print the comparison of a finished run."""
    from weightfold.training.result import comparison

    results, config = run["results"], run["config"]
    both = len(results["arms"]) == 2
    title = f"{config['model']} on {run['data']['name']}, {config['epochs']} epochs, seed {config['seed']}"
    rows = []
    for row in comparison(results):
        values = [show.quantity(row[arm], row["unit"]) for arm in ("dense", "folded") if arm in results["arms"]]
        rows.append([row["name"], *values, *([show.change(row)] if both else [])])
    names = [name for name in ("dense", "folded") if name in results["arms"]]
    heads = ["pruned" if name == "folded" and config["method"] == "prune" else name for name in names]
    show.table(["", *heads, *(["change"] if both else [])], rows, right=(1, 2, 3), title=title)
    console = show.console()
    for line in remarks(results):
        console.print(line)
    console.print()
    console.print(f"report  {out / 'report.html'}")
    console.print(f"model   {out / 'model.safetensors'}")
    console.print(f"ledger  {out / 'ledger.db'}, {results['entries']} entries, head {results['head'][:16]}")


def remarks(results: dict[str, Any]) -> list[str]:
    """Say in sentences what a table cannot."""
    lines = []
    paired = results.get("paired")
    if paired:
        low, high = (100 * value for value in paired["interval"])
        text = (
            f"Of {paired['answers']:,} test answers {paired['gained']} became right and {paired['lost']} wrong: "
            f"a difference of {100 * paired['difference']:+.2f} pp, 95 % interval {low:+.2f} to {high:+.2f}; one seed."
        )
        lines.append(text.replace("-", "−"))
    folded = results["arms"].get("folded")
    if folded and "prepare_seconds" in folded:
        n_done = sum(event["accepted"] for event in folded["events"])
        lines.append(
            f"Its training seconds include {folded['prepare_seconds']:.1f} of preparation and "
            f"{folded['event_seconds']:.1f} for {n_done} of {len(folded['events'])} proposed edits accepted."
        )
        if not n_done:
            why = next((event["reason"] for event in folded["events"]), "see weightfold ledger show")
            lines.append(f"[red]No edit was accepted,[/] the network kept its widths: {why}.")
    return lines
