"""`weightfold merge`: one model of several, if that makes sense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Shapes
from weightfold.cli.pairs import Maker, open_one, write_weights

if TYPE_CHECKING:
    from torch import nn

METHODS = ("average", "task-arithmetic", "ties", "dare")


@guarded
def merge(
    models: Annotated[list[str], typer.Argument(metavar="A B...", help="Models; or files of weights, with --model.")],
    model: Maker = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the weights; without, only say if.")] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS))] = "average",
    base: Annotated[str | None, typer.Option(metavar="SPEC", help="What the models were fine-tuned from.")] = None,
    strength: Annotated[float, typer.Option(help="Factor of the changes, with a base.")] = 1.0,
    repair: Annotated[bool, typer.Option("--repair", help="Repair the merged model on inputs of --data.")] = False,
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Inputs for repair, and scores.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the loss between the first two, before and after.")
    ] = None,
    example: Shapes = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Merge although the gate says no.")] = False,
    as_json: Json = False,
) -> None:
    """Say whether and why models can be merged; align them and merge them."""
    import torch

    from weightfold.errors import ConfigError
    from weightfold.weights.merge import gate

    if len(models) < 2:
        raise ConfigError("Merging takes two models or more.")
    if method not in METHODS:
        raise ConfigError(f"There is no method '{method}'.", remedy=f"Choose one of {', '.join(METHODS)}.")
    if method != "average" and base is None:
        raise ConfigError(f"'{method}' needs what the models were fine-tuned from.", remedy="Pass --base.")
    if (repair or plot is not None) and data is None:
        raise ConfigError("Repair and plots need inputs.", remedy="Pass --data.")
    if plot is not None and out is None:
        raise ConfigError("A plot is drawn of what was merged.", remedy="Pass --out.")
    opened = [open_one(spec, model, example, data) for spec in models]
    networks, inputs = [m for m, _ in opened], opened[0][1]
    gates = [gate(networks[0], other, inputs) for other in networks[1:]]
    told: dict[str, Any] = {"models": models, "gates": [_told(g) for g in gates]}
    refused = any(g.verdict == "no" for g in gates) and not force
    if out is not None and not refused:
        start = None if base is None else open_one(base, model, example, data)[0]
        generator = torch.Generator().manual_seed(seed)
        merged, basis = _merged(networks, gates, inputs, method, start, strength, generator)
        told |= _finished(merged, basis, data, repair=repair)
        if plot is not None and data is not None:
            told["barriers"] = _drawn(networks, basis, data, plot)
        write_weights(told.pop("model"), out)
        told["out"] = str(out)
    if as_json:
        show.print_json(told)
    else:
        _print(told, models)
    if refused:
        raise typer.Exit(1)


def _told(found: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)


def _merged(
    networks: list[nn.Module],
    gates: list[Any],
    inputs: Any,
    method: str,
    base: nn.Module | None,
    strength: float,
    generator: Any,
) -> tuple[nn.Module, list[nn.Module]]:
    """The merged model, and its parents in one basis."""
    from weightfold.weights import merge as ways
    from weightfold.weights.align import align
    from weightfold.weights.canon import balanced
    from weightfold.weights.soft import soft

    if any(g.verdict == "softly" for g in gates):
        evened = [balanced(m, inputs) for m in networks]
        basis = [evened[0], *(soft(evened[0], m, inputs) for m in evened[1:])]
    elif base is not None:
        basis = [align(base, m, inputs).model for m in networks]
    elif all(g.verdict == "as they are" for g in gates):
        basis = networks
    else:
        basis = ways.align_all([balanced(m, inputs) for m in networks], inputs)
    if base is None:
        return ways.average(basis), basis
    if method == "ties":
        return ways.ties(base, basis, strength=strength), basis
    if method == "dare":
        return ways.dare(base, basis, generator, strength=strength), basis
    if method == "task-arithmetic":
        return ways.task_arithmetic(base, basis, strength), basis
    return ways.average(basis), basis


def _finished(merged: nn.Module, basis: list[nn.Module], data: str | None, *, repair: bool) -> dict[str, Any]:
    """Repair, and scores on the validation samples."""
    if data is None:
        return {"model": merged}
    import torch

    from weightfold.data import load
    from weightfold.training.measure import evaluate
    from weightfold.weights.path import repair as repaired

    loaded = load(data)
    if repair:
        drawn = loaded.batches("train", 256, generator=torch.Generator().manual_seed(0))
        merged = repaired(merged, basis, [x for (x, _), _ in zip(drawn, range(4), strict=False)])
    named = {"first": basis[0], "merged": merged}
    scores = {name: evaluate(m.eval(), loaded, "val", torch.device("cpu")) for name, m in named.items()}
    return {"model": merged, "scores": {n: {"loss": s.loss, "score": s.value} for n, s in scores.items()}}


def _drawn(networks: list[nn.Module], basis: list[nn.Module], data: str, plot: Path) -> dict[str, float]:
    """Draw the validation loss along both straight paths; the barrier of each that has one shape."""
    import torch

    from weightfold.artifact import write_bytes
    from weightfold.data import load
    from weightfold.training.measure import evaluate
    from weightfold.weights import path as paths
    from weightfold.weights.compare import differences, weights_of

    loaded = load(data)
    ends = {"as stored": networks[:2], "aligned": basis[:2]}
    lines = {
        name: paths.path(a, b, lambda m: evaluate(m.eval(), loaded, "val", torch.device("cpu")).loss)
        for name, (a, b) in ends.items()
        if not differences(weights_of(a), weights_of(b))
    }
    write_bytes(plot, paths.plot(lines, unit="validation loss").encode())
    return {name: line.barrier for name, line in lines.items()}


def _print(told: dict[str, Any], models: list[str]) -> None:
    console = show.console()
    for spec, found in zip(models[1:], told["gates"], strict=True):
        console.print(f"{show.plain(models[0])} and {show.plain(spec)}: {found['verdict']}")
        for reason in found["reasons"]:
            console.print(f"  - {show.plain(reason)}")
    for name, score in told.get("scores", {}).items():
        console.print(f"{name}: loss {score['loss']:.4f}, score {score['score']:.4f}")
    for name, barrier in told.get("barriers", {}).items():
        console.print(f"barrier {name}: {barrier:.4f}")
    if "out" in told:
        console.print(f"wrote {show.plain(told['out'])}")
