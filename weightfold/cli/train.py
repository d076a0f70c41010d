"""`weightfold train`: the main job."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
    self_compress = "self-compress"
    none = "none"


class Device(StrEnum):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


MAX_LAYERS = 24
"""More layers are left to the report."""
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
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keep to widths that weightfold tune found quick; refuse edits that make it slower."
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(help="When to act, as a share of the steps.", show_default="0.1, self-compress: by the target"),
    ] = None,
    max_accuracy_loss: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Dial: fold or compress as far as this costs.")
    ] = None,
    time_goal: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Dial: fold as far as this saves; in place of keep and at.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="SIZE", help="self-compress: size of the file, such as 48kB or 1.5%.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(metavar="NATS", help="self-compress: cost of a bit, in place of a target.")
    ] = None,
    activation_strength: Annotated[
        float, typer.Option(metavar="NATS", help="self-compress: cost of all bit operations, for inputs of few bits.")
    ] = 0.0,
    pareto: Annotated[
        int,
        typer.Option(
            metavar="N", help="self-compress: keep up to N networks on the way, of other sizes, as front-1.wfp ..."
        ),
    ] = 0,
    max_increase: Annotated[float, typer.Option(help="Largest rise of the probe loss that is accepted.")] = 0.1,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Leave out the dense network.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="runs/DATA")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the run in that folder.")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with an interrupted run.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train.")] = Device.auto,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.")] = None,
    as_json: Json = False,
) -> None:
    """Train a dense network and, paired with it, one that folds or compresses itself meanwhile; compare the two."""
    if resume is not None:
        _refuse_others(ctx)
        _run(resume, None, as_json=as_json)
        return
    if method is Method.self_compress:
        _refuse_given(ctx, ("keep",), "--method self-compress takes --target, --max-accuracy-loss or --strength")
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
        "method": method.name,
        "keep": keep,
        **({} if tuned is None else _tuned(tuned)),
        "at": at,
        "max_accuracy_loss": max_accuracy_loss,
        "time_goal": time_goal,
        "target": target,
        "strength": strength,
        "activation_strength": activation_strength,
        "pareto": pareto,
        "max_increase": max_increase,
        "dense": not no_dense,
        "device": device.value,
        "threads": threads,
    }
    _run(out or Path("runs", Path(data or source).stem), config, force=force, as_json=as_json)


def _tuned(path: Path) -> dict[str, Any]:
    """Widths of a table, and the race that it stands for."""
    from weightfold.kernels import Tuned

    table = Tuned.read(path)
    race = {"target": table.target, "batch": (*table.shape, 1)[0], "threads": table.threads}
    return {"liked": table.all_liked(), "race": race}


def _run(out: Path, config: dict[str, Any] | None, *, force: bool = False, as_json: bool) -> None:
    """Start a run, or go on with one if there is no config; write the report; print the comparison."""
    from weightfold.cli.live import board
    from weightfold.report import write_report
    from weightfold.training import TrainConfig
    from weightfold.training import resume as go_on
    from weightfold.training import train as start
    from weightfold.training.folder import begun

    checked = None if config is None else TrainConfig(**config)
    method = begun(out)["config"].get("method", "fold") if checked is None else checked.method
    try:
        with _plain_warnings(), board(method, quiet=as_json) as tell:
            if checked is None:
                run = go_on(out, watch=tell, after=write_report)
            else:
                run = start(checked, out, force=force, watch=tell, after=write_report)
    except KeyboardInterrupt:
        raise _interrupted(out) from None
    if as_json:
        show.print_json({"out": str(out), **run})
        return
    print_run(out, run)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Write warnings as one line each, without the place in the code."""
    import warnings

    from weightfold.cli.door import warn

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


def _interrupted(out: Path) -> BaseException:
    from weightfold.cli.door import INTERRUPTED, complain

    resumable = (out / "run.json").exists()
    remedy = f"\n  -> Go on by the same command, or: weightfold train --resume {out}" if resumable else ""
    complain(f"Interrupted; nothing half-written was left behind.{remedy}")
    return typer.Exit(INTERRUPTED)


def _refuse_others(ctx: typer.Context) -> None:
    """With --resume all settings come from the run."""
    others = [name for name in ctx.params if name not in ALONE]
    _refuse_given(ctx, others, "--resume takes all settings from the run", "Leave it out, or start a new run.")


def _refuse_given(ctx: typer.Context, names: Iterable[str], why: str, remedy: str = "Leave it out.") -> None:
    """Refuse options that were given, though they do not belong here."""
    from weightfold.errors import ConfigError

    for name in names:
        given = ctx.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            option = name.replace("_", "-")
            raise ConfigError(f"{why}; '{option}' cannot be given with it.", remedy=remedy)


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


def print_run(out: Path, run: dict[str, Any]) -> None:
    """Print the comparison of a finished run."""
    from weightfold.cli.live import NAMES
    from weightfold.training.result import comparison

    results, config = run["results"], run["config"]
    both = len(results["arms"]) == 2
    title = f"{config['model']} on {run['data']['name']}, {config['epochs']} epochs, seed {config['seed']}"
    rows = []
    for row in comparison(results):
        values = [show.quantity(row[arm], row["unit"]) for arm in ("dense", "folded") if arm in results["arms"]]
        rows.append([row["name"], *values, *([show.change(row)] if both else [])])
    names = [name for name in ("dense", "folded") if name in results["arms"]]
    heads = [NAMES.get(config["method"], name) if name == "folded" else name for name in names]
    show.table(["", *heads, *(["change"] if both else [])], rows, right=(1, 2, 3), title=title)
    if "packed" in results["arms"].get("folded", {}):
        print_layers(results["arms"]["folded"])
        print_front(results["arms"]["folded"])
    console = show.console()
    for line in [*remarks(results), *raced(results["arms"], config.get("race"))]:
        console.print(line)
    console.print()
    console.print(f"report  {out / 'report.html'}")
    packed = results["arms"].get("folded", {}).get("packed")
    if packed:
        console.print(f"file    {out / 'model.wfp'}, {packed['coded_bytes']:,} bytes")
    console.print(f"model   {out / 'model.safetensors'}{', the same values as floats' if packed else ''}")
    console.print(f"ledger  {out / 'ledger.db'}, {results['entries']} entries, head {results['head'][:16]}")


def print_layers(arm: Mapping[str, Any]) -> None:
    """Print what is left of each layer of a self-compressed network."""
    if len(arm["layers"]) > MAX_LAYERS:
        return
    rows = []
    for layer in arm["layers"]:
        (channels, living), (full, left) = layer["rows"], layer["weights"]
        taken = arm["packed"]["by_tensor"][layer["name"]]
        share = f"{left:,} of {full:,}"
        rows.append([layer["name"], f"{living} of {channels}", share, f"{layer['bits']:.1f}", f"{taken:,.0f}"])
    show.table(["layer", "channels", "weights left", "bits", "bytes"], rows, right=(1, 2, 3, 4))


def print_front(arm: Mapping[str, Any]) -> None:
    """Print the networks that were kept on the way."""
    rows = [
        [row["file"], f"{row['bytes']:,}", show.quantity(row["score"], "share"), f"{row['step']:,}"]
        for row in arm.get("front", ())
    ]
    if rows:
        show.table(["kept on the way", "bytes", "test score", "step"], rows, right=(1, 2, 3))


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
    if folded and "packed" in folded:
        lines.append(_file_in_words(folded))
        aim = folded["packed"]["target_bytes"]
        if aim is not None and folded["size_bytes"] > aim:
            over = folded["size_bytes"] - aim
            lines.append(f"[red]That is {over:,} bytes more than asked for:[/] train for more epochs, or ask for more.")
    if folded and "prepare_seconds" in folded:
        n_done = sum(event["accepted"] for event in folded["events"])
        edits = f" and {folded['event_seconds']:.1f} for {n_done} of {len(folded['events'])} proposed edits accepted"
        lines.append(
            f"Its training seconds include {folded['prepare_seconds']:.1f} of preparation"
            f"{edits if folded['events'] else ''}."
        )
        if not n_done and "packed" not in folded:
            why = next((event["reason"] for event in folded["events"]), "see weightfold ledger show")
            lines.append(f"[red]No edit was accepted,[/] the network kept its widths: {why}.")
    return lines


def raced(arms: Mapping[str, Any], race: Mapping[str, Any] | None) -> list[str]:
    """Say how quick the networks are where the table of `--tuned` was measured.

    Example:
        >>> arms = {"dense": {"target_ms": 0.02}, "folded": {"target_ms": 0.0123}}
        >>> raced(arms, {"target": "onnx-cpu", "batch": 1, "threads": 1})
        ['On onnx-cpu, batch 1, 1 thread: 0.012 ms an inference, the dense network 0.020.']
    """
    if race is None or "target_ms" not in arms.get("folded", {}):
        return []
    threads = show.counted(race["threads"], "thread")
    mine = show.quantity(arms["folded"]["target_ms"], "ms")
    dense = arms.get("dense", {}).get("target_ms")
    beside = "" if dense is None else f", the dense network {show.quantity(dense, 'ms')}"
    return [f"On {race['target']}, batch {race['batch']}, {threads}: {mine} ms an inference{beside}."]


def _file_in_words(arm: Mapping[str, Any]) -> str:
    packed, (full, left) = arm["packed"], arm["weights"]
    aim = packed["target_bytes"]
    asked = "" if aim is None else f" (asked for: {aim:,})"
    return (
        f"The file takes {packed['coded_bytes']:,} bytes{asked}, {100 * packed['share']:.2g} % of the float network's "
        f"{packed['fp32_bytes']:,}; without the entropy coder {packed['packed_bytes']:,}. It keeps {left:,} of "
        f"{full:,} weights, {100 * left / full:.2g} %."
    )
