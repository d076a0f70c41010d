"""The end of a run: test scores, sizes, times, the last entry of the ledger, the saved models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightfold.artifact import Builder
from weightfold.blueprint import find_aliases, state_tensors
from weightfold.data import Dataset
from weightfold.export import Source, save_model, save_packed
from weightfold.export.example import task_input
from weightfold.export.saved import write_structure
from weightfold.fingerprint import digest, fingerprint
from weightfold.ledger import Ledger
from weightfold.size import macs, parameters
from weightfold.training import folder as files
from weightfold.training.arm import Arm
from weightfold.training.looks import coded_facts, final_values, packed_facts
from weightfold.training.measure import evaluate, latency_ms, paired_difference, score_name, slice_inputs

LATENCY_BATCHES = (1, 64)


def finish(arms: Mapping[str, Arm], data: Dataset, ledger: Ledger, out: Path, builder: Builder) -> dict[str, Any]:
    """Measure the trained networks and save them.

    Returns:
        results: by network, and compared.
    """
    models = {name: arm.finish() for name, arm in arms.items()}
    device = next(iter(arms.values())).device
    scores = {name: evaluate(model, data, "test", device) for name, model in models.items()}
    paired = paired_difference(scores["dense"], scores["folded"]) if len(scores) == 2 else None
    results: dict[str, Any] = {
        "score": score_name(data.task),
        "arms": {name: _facts(arms[name], models[name], scores[name]) for name in arms},
        "paired": paired,
    }
    tensors = {name: tensor_digests(model) for name, model in models.items()}
    hashed = {"arms": results["arms"], "paired": paired, "tensors": tensors}
    ledger.append("result", hashed, aside={name: arm.seconds for name, arm in arms.items()})
    results["head"], results["entries"] = ledger.head, len(ledger)
    _save(arms, models, data, ledger.head, out, builder)
    _add_wall_clock(results, arms, models, data, out)
    for name, arm in arms.items():
        if arm.start is not None:
            source = Source(models[name], (task_input(data.task),), arm.before, builder, ledger.head)
            _add_packed(results["arms"][name], arm, source, out / files.PACKED)
            _add_front(results["arms"][name], arm, source, data, out)
            ledger.log_metrics(arm.total_steps, final_values(results["arms"][name]))
    return results


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Hash every stored tensor of a model by itself, so that a changed one can be named; 64 bits each.

    Example:
        >>> tensor_digests(nn.Linear(2, 1)).keys()
        dict_keys(['weight', 'bias'])
    """
    aliases = find_aliases(model)
    return {n: digest({n: tensor})[:16] for n, tensor in state_tensors(model).items() if n not in aliases}


def file_of(name: str, arms: Mapping[str, Any]) -> str:
    """Name the file of a network: the smaller one is the run's model, the dense one only if it is alone."""
    return files.MODEL if name == "folded" or len(arms) == 1 else files.DENSE


def _facts(arm: Arm, model: nn.Module, score: Any) -> dict[str, Any]:
    """What is the same whenever the run is done again."""
    example = arm.task.example(1).to(arm.device)
    after = {} if arm.compressor is None else {group.name: group.n_channels for group in arm.compressor.graph}
    coded = arm.quantising.result if arm.quantising else None
    return {
        "score": score.value,
        "loss": score.loss,
        "parameters": parameters(model),
        "macs": macs(model, example),
        "fingerprint": fingerprint(model),
        "widths": [[name, before, after.get(name, before)] for name, before in arm.widths.items()],
        **({} if coded is None or arm.start is None else coded_facts(coded, arm.start)),
    }


def _save(
    arms: Mapping[str, Arm], models: Mapping[str, nn.Module], data: Dataset, head: str, out: Path, builder: Builder
) -> None:
    inputs = [task_input(data.task)]
    for name, model in models.items():
        path = out / file_of(name, arms)
        structure = save_model(model, path, before=arms[name].before, builder=builder, inputs=inputs, ledger_head=head)
        if path.name == files.MODEL:
            write_structure(structure, out)


def _add_packed(facts: dict[str, Any], arm: Arm, source: Source, path: Path) -> None:
    """Write the packed file, which is what such a network takes; the plain one beside it holds the same values."""
    coded = arm.quantising.result if arm.quantising else None
    assert coded is not None
    assert arm.start is not None
    sizes = save_packed(source, coded.coded, path)
    facts["packed"] = packed_facts(source, coded, sizes, arm.start)
    facts["plain_bytes"], facts["size_bytes"] = facts["size_bytes"], sizes.total_bytes
    facts["file"] = path.name


def _add_front(facts: dict[str, Any], arm: Arm, source: Source, data: Dataset, out: Path) -> None:
    """Write the networks of the front, the smallest first, and score them."""
    assert arm.quantising is not None
    for point, name in zip(arm.quantising.front, files.FRONT, strict=False):
        network = point.network.eval()
        sizes = save_packed(replace(source, model=network), point.tensors.coded, out / name)
        score = evaluate(network, data, "test", arm.device)
        row = {"file": name, "bytes": sizes.total_bytes, "step": point.step, "score": score.value, "loss": score.loss}
        facts.setdefault("front", []).append(row)


def _add_wall_clock(
    results: dict[str, Any], arms: Mapping[str, Arm], models: Mapping[str, nn.Module], data: Dataset, out: Path
) -> None:
    """Add what differs from one time to the next, and the sizes of the files."""
    device = next(iter(arms.values())).device
    with torch.inference_mode():
        times = {n: latency_ms(models, slice_inputs(data, n, device)) for n in LATENCY_BATCHES}
    for name, arm in arms.items():
        facts = results["arms"][name]
        facts["file"] = file_of(name, arms)
        facts["size_bytes"] = (out / facts["file"]).stat().st_size
        facts["seconds"] = arm.seconds
        facts["prepare_seconds"] = arm.prepare_seconds
        facts["event_seconds"] = arm.event_seconds
        facts["events"] = arm.events
        for n in LATENCY_BATCHES:
            facts[f"latency_ms_{n}"] = times[n][name]
    for name, ms in _race(arms, models).items():
        results["arms"][name]["target_ms"] = ms


def _race(arms: Mapping[str, Arm], models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Milliseconds of each network in the runtime that a run was tuned for; nothing where it was not, or by a hair."""
    speed = arms["folded"].speed if "folded" in arms else None
    if speed is None or speed(models["folded"]) or speed.times is None:
        return {}
    return {name: ms for name, ms in zip(("dense", "folded"), speed.times, strict=True) if name in arms}
