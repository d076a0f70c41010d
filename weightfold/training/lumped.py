"""Lump a trained network once, and account for it: what went, what is guaranteed, what was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from weightfold.bounds import lumped_bound
from weightfold.compressor import Compressor
from weightfold.config import Config
from weightfold.data import Dataset
from weightfold.errors import ConfigError, DataError
from weightfold.export import save_model
from weightfold.export.example import zeros
from weightfold.export.saved import write_structure
from weightfold.export.source import Source
from weightfold.fingerprint import fingerprint
from weightfold.graph.copies import independent_copy
from weightfold.graph.edit import Edit
from weightfold.ledger import Ledger
from weightfold.methods.lump import Lump
from weightfold.repair import distance, gauss_newton_, jittered, output_of
from weightfold.size import macs, parameters
from weightfold.stats.norms import recalibrate_
from weightfold.training import folder as files
from weightfold.training.environment import machine, versions
from weightfold.training.measure import Score, evaluate, score_name

BATCH = 128
JITTER = 1.5
"""Inputs that a fit of all weights takes, over those given: the others are jittered copies."""
AFFORDED = 3e8
"""Multiply-accumulates over all inputs up to which all weights are fitted without being asked for."""
SWEEP_EPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4)
SWEEP_TARGETS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)


class LumpRunConfig(Config):
    """How to lump a trained network."""

    eps: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """tolerance, relative to each group's scale"""
    target: float | None = Field(default=None, gt=0, le=1)
    """share of the parameters to keep, in place of `eps`"""
    linkage: str = "complete"
    """"complete" or "single\""""
    repair: int = Field(default=0, ge=0)
    """unlabelled inputs to solve the readers on; 0: data-free"""
    polish: int | None = Field(default=None, ge=0)
    """with `repair`: rounds of Gauss-Newton on all weights; by default 10 where they are cheap, else 0"""
    box: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """inputs for which the bound holds: every number within plus and minus this"""
    seed: int = Field(default=0, ge=0)
    """of the choice of inputs"""


@dataclass(frozen=True, eq=False)
class Lumped:
    """A lumped network and what is known of it.

    Args:
        facts: plain data: parameters, kinds, bound, measured change, repair.
    """

    model: nn.Module
    facts: dict[str, Any]


def lump_network(
    model: nn.Module,
    example: Any,
    config: LumpRunConfig,
    inputs: Sequence[Any] = (),
    ledger: Ledger | None = None,
) -> Lumped:
    """Lump a network in place; repair it if inputs are given.

    Args:
        model: trained; left in evaluation mode.
        example: what `trace` takes.
        inputs: unlabelled batches, as the model takes them.
        ledger: where everything is recorded.
    Raises:
        WeightfoldError: what `Lump` and the compressor refuse; `repair` without inputs.
    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = lump_network(net, torch.zeros(1, 4), LumpRunConfig(eps=0.0))
        >>> found.facts["parameters"], found.facts["bound"]
        ([58, 58], 0.0)
    """
    if config.repair and not inputs:
        raise ConfigError("A repair needs unlabelled inputs.", remedy="Pass --data, or leave out --repair.")
    model.eval()
    batches = list(inputs) if config.repair else []
    whole = independent_copy(model)
    method = Lump(eps=config.eps, target=config.target, linkage=config.linkage, inputs=batches)
    compressor = Compressor(model, example, [method], ledger=ledger, seed=config.seed, keep_undo=ledger is not None)
    graph = compressor.prepare()
    before = [parameters(model), macs(model, example)]
    start = time.perf_counter()
    events = compressor.once()
    if refused := [event for event in events if not event.accepted]:
        raise DataError(refused[0].reason.partition("\n")[0])
    edits = [edit for proposal in method.proposed for edit in proposal.edits]
    facts: dict[str, Any] = {
        "events": [{"group": e.group, "before": e.channels_before, "after": e.channels_after} for e in events],
        "kinds": _kinds(method),
        "box": config.box,
        **_bound(whole, graph, edits, example, config),
        "warnings": _warnings(batches or list(inputs)),
    }
    if batches:
        facts["repair"] = _repair(model, whole, batches, config, before[1], ledger)
    if inputs:
        facts["measured"] = distance(model, whole, inputs)
    compressor.convert().eval()
    facts |= {
        "parameters": [before[0], parameters(model)],
        "macs": [before[1], macs(model, example)],
        "seconds": time.perf_counter() - start,
        "fingerprint": fingerprint(model),
    }
    return Lumped(model, facts)


def _kinds(method: Lump) -> dict[str, int]:
    """How many channels went, by kind of equivalence."""
    total: dict[str, int] = {}
    for proposal in method.proposed:
        for kind, n in proposal.why.get("kinds", {}).items():
            total[kind] = total.get(kind, 0) + n
    return total


def _bound(whole: nn.Module, graph: Any, edits: Sequence[Edit], example: Any, config: LumpRunConfig) -> dict[str, Any]:
    """The guarantee of a data-free lumping; None with the reason where there is none."""
    if config.repair:
        return {"bound": None, "no_bound": "the readers were solved on data"}
    try:
        return {"bound": lumped_bound(whole, graph, edits, example, (-config.box, config.box)), "no_bound": ""}
    except ConfigError as error:
        return {"bound": None, "no_bound": error.message.removeprefix("No bound: ")}


def _warnings(batches: Sequence[Any]) -> list[str]:
    """Say where inputs are not standardised, with the figure."""
    tensors = [b for b in batches if isinstance(b, Tensor) and b.is_floating_point() and b.ndim == 2]
    if not tensors:
        return []
    x = torch.cat(tensors).double()
    mean, std = x.mean(0), x.std(0)
    off = (mean.abs() > 0.5) | (std > 2) | ((std < 0.5) & (std > 0))
    if float(off.double().mean()) <= 0.25:
        return []
    at = int(off.double().argmax())
    return [
        f"{int(off.sum())} of {len(mean)} inputs are not standardised (input {at}: mean {float(mean[at]):.3g}, "
        f"standard deviation {float(std[at]):.3g}): ε and the bound are in units of the inputs as they are."
    ]


def _repair(
    model: nn.Module, whole: nn.Module, batches: Sequence[Any], config: LumpRunConfig, cost: int, ledger: Ledger | None
) -> dict[str, Any]:
    """Batch norms measured anew, and all weights fitted to the whole network's outputs where that is cheap."""
    start = time.perf_counter()
    solved = distance(model, whole, batches)
    n = sum(len(b[0] if isinstance(b, tuple) else b) for b in batches)
    rounds = config.polish
    plain = all(isinstance(b, Tensor) for b in batches)
    if rounds is None:
        rounds = 10 if plain and n * cost <= AFFORDED else 0
    kept = {name: value.clone() for name, value in model.named_buffers()}
    norms = recalibrate_(model, batches)
    if norms and distance(model, whole, batches)["rms"] > solved["rms"]:
        norms = 0
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(kept[name])
    errors: list[float] = []
    if rounds:
        if not plain:
            raise ConfigError("Gauss-Newton takes networks of one input.", remedy="Pass --polish 0.")
        x = torch.cat([b for b in batches if isinstance(b, Tensor)])
        if x.is_floating_point():
            x = jittered(x, round(JITTER * len(x)), torch.Generator().manual_seed(config.seed))
        with torch.no_grad():
            wished = output_of(whole, x)
        errors = gauss_newton_(model, x, wished, rounds=rounds, iterations=30)
    facts = {
        "inputs": n,
        "batch_norms": norms,
        "rounds": max(len(errors) - 1, 0),
        "mean_square_error": [errors[0], errors[-1]] if errors else [],
        "closed_form": solved,
    }
    if ledger is not None:
        ledger.append(
            "repair", {**facts, "fingerprint": fingerprint(model)}, aside={"seconds": time.perf_counter() - start}
        )
    return facts


def take(data: Dataset, n: int, seed: int) -> list[Tensor]:
    """The wished number of unlabelled training inputs, in batches."""
    found, left = [], n
    for inputs, _ in data.batches("train", BATCH, generator=torch.Generator().manual_seed(seed)):
        if left <= 0:
            break
        found.append(inputs[:left])
        left -= len(found[-1])
    return found


def lump_opened(source: Source, config: LumpRunConfig, *, data: Dataset | None = None) -> dict[str, Any]:
    """Lump an opened model, and write nothing."""
    inputs = [] if data is None else take(data, config.repair or 1024, config.seed)
    device = torch.device("cpu")
    before = None if data is None else evaluate(source.model, data, "test", device)
    results = lump_network(source.model, zeros(source.inputs), config, inputs).facts
    if data is not None and before is not None:
        after = evaluate(source.model, data, "test", device)
        results |= {"score": score_name(data.task), "scores": [before.value, after.value]}
    return results


def lump_to_folder(
    source: Source, config: LumpRunConfig, out: Path, *, data: Dataset | None = None, force: bool = False
) -> dict[str, Any]:
    """Lump an opened model, and write a folder with model, ledger and facts.

    Raises:
        WeightfoldError: anything that can be found wrong; the folder is left as it was then.
    """
    files.check(out, force=force)
    inputs = [] if data is None else take(data, config.repair or 1024, config.seed)
    model, device = source.model, torch.device("cpu")
    before = None if data is None else evaluate(model, data, "test", device)
    facts = {
        "config": {"model": source.builder.name, **config.model_dump(mode="json")},
        "versions": versions(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "data": None if data is None else {"name": data.name, "fingerprint": data.fingerprint},
        "initial_weights": fingerprint(model),
        "total_steps": 0,
    }
    with files.claimed(out, "lump", force=force) as left:
        if left is None:
            return files.written_whole(out, lambda: _written(source, config, out, data, before, inputs, facts))
        told = {key: facts[key] for key in ("config", "data", "initial_weights")}
        files.check_same(out, left, {"kind": "lump", **told})
        return left


def _written(
    source: Source,
    config: LumpRunConfig,
    out: Path,
    data: Dataset | None,
    before: Score | None,
    inputs: Sequence[Tensor],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Lump, and write all files of the run."""
    model, device = source.model, torch.device("cpu")
    twin = independent_copy(model)
    with Ledger.create(out / files.LEDGER, run=facts) as ledger:
        found = lump_network(model, zeros(source.inputs), config, inputs, ledger)
        results = found.facts
        if data is not None and before is not None:
            after = evaluate(model, data, "test", device)
            results |= {"score": score_name(data.task), "scores": [before.value, after.value]}
        ledger.append("result", {"lump": {k: v for k, v in results.items() if k != "seconds"}})
        head = ledger.head
    for name, network in ((files.DENSE, twin), (files.MODEL, model)):
        structure = save_model(
            network,
            out / name,
            before=source.before,
            builder=source.builder,
            inputs=source.inputs,
            ledger_head=head,
        )
    write_structure(structure, out)
    run = {"status": "done", "kind": "lump", **facts, "machine": machine(device), "results": results, "head": head}
    return files.write_run(out, run)


def sweep(source: Source, config: LumpRunConfig, *, data: Dataset | None = None) -> list[dict[str, Any]]:
    """The whole trade-off: one row per tolerance, or per target where data are given."""
    inputs = [] if data is None else take(data, config.repair or 1024, config.seed)
    by_target = bool(config.repair) or config.target is not None
    rows = []
    for value in SWEEP_TARGETS if by_target else SWEEP_EPS:
        model = independent_copy(source.model)
        one = LumpRunConfig(
            **{**config.model_dump(), "eps": None if by_target else value, "target": value if by_target else None}
        )
        try:
            facts = lump_network(model, zeros(source.inputs), one, inputs).facts
        except ConfigError as error:
            if by_target and "cannot be met" in error.message:
                break
            raise
        row = {
            "target" if by_target else "eps": value,
            "kept": facts["parameters"][1] / facts["parameters"][0],
            "bound": facts["bound"],
            "measured": facts.get("measured"),
        }
        if data is not None:
            row["score"] = evaluate(model, data, "test", torch.device("cpu")).value
        rows.append(row)
    return rows
