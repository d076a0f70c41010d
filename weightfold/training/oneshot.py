"""Fold a trained network once, and account for it as for a training run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from weightfold.config import Config
from weightfold.data import Dataset, load
from weightfold.data.dataset import Batch
from weightfold.errors import DataError
from weightfold.export import save_model
from weightfold.export.opened import open_model
from weightfold.export.saved import write_structure
from weightfold.export.source import Source
from weightfold.fingerprint import fingerprint
from weightfold.graph.copies import independent_copy
from weightfold.kernels import Tuned
from weightfold.ledger import Ledger
from weightfold.size import macs, parameters
from weightfold.training import folder as files
from weightfold.training.arm import widths_of
from weightfold.training.environment import machine, versions
from weightfold.training.finish import LATENCY_BATCHES, tensor_digests
from weightfold.training.measure import (
    Score,
    evaluate,
    latency_ms,
    paired_difference,
    score_name,
    slice_inputs,
)

BATCH = 64
N_PROBE = 8


class OneShotConfig(Config):
    """What to fold, by what, and how far."""

    model: str
    """a built-in name, package.module:function, a saved model, or the folder of a run"""
    weights: str | None = None
    """a file of trained weights"""
    data: str
    """a built-in data set, a file or a folder"""
    keep: float | None = Field(default=None, gt=0, le=1)
    """share of the channels to keep"""
    macs: float | None = Field(default=None, gt=0, le=1)
    """share of the multiply-accumulates to keep, in place of `keep`"""
    tuned: str | None = None
    """a table of `weightfold tune`: widths are those that it likes, and a slower network is refused"""
    samples: PositiveInt = 1024
    """unlabelled training inputs to look at"""
    max_increase: float | None = Field(default=None, ge=0)
    """largest rise of the loss on labelled training samples that is accepted; None looks at no labels"""
    seed: NonNegativeInt = 0
    """of the choice of inputs"""


def fold_trained(
    config: OneShotConfig, out: str | Path, *, force: bool = False, after: Callable[[Path], object] | None = None
) -> dict[str, Any]:
    """Fold a trained network at once and write a run's folder.

    Args:
        config: what to fold.
        out: the folder; missing, empty, or of the same command, interrupted.
        force: write over the run that the folder holds.
        after: called with the folder of the finished run, before others may work in it.
    Returns:
        run: what `run.json` holds.
    Raises:
        WeightfoldError: anything that can be found wrong. The folder is left as it was then.
        ConfigError: another process is at work in the folder, or it holds something else.
    """
    out = Path(out)
    files.check(out, force=force)
    data = load(config.data)
    source = open_model(config.model, weights=config.weights, task=data.task)
    original = _scored(source.model, data)
    with files.claimed(out, "fold", force=force) as left:
        if left is None:
            run = files.written_whole(out, lambda: _fold(config, out, data, source, original))
        else:
            facts = _facts(config, data, source.model)
            told = {key: facts[key] for key in ("config", "data", "initial_weights")}
            files.check_same(out, left, {"kind": "fold", **told})
            run = left
        if after is not None:
            after(out)
        return run


def _scored(model: nn.Module, data: Dataset) -> Score:
    """Score the network as it is; that it can be scored shows that it fits the data."""
    try:
        return evaluate(model, data, "test", torch.device("cpu"))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise DataError(
            f"The model fails on '{data.name}', whose inputs have the shape (B, "
            f"{', '.join(map(str, data.task.input.shape))}) and whose answers have {data.task.output.width} numbers: "
            f"{type(error).__name__}: {reason}",
            remedy="Pass the data that the model was trained for.",
        ) from error


def _fold(config: OneShotConfig, out: Path, data: Dataset, source: Source, original: Score) -> dict[str, Any]:
    model = source.model
    facts = _facts(config, data, model)
    dense = _measured(model, data, original)
    twin = independent_copy(model)
    with Ledger.create(out / files.LEDGER, run=facts) as ledger:
        start = time.perf_counter()
        events, widths, net = _compress(config, data, model, ledger)
        seconds = time.perf_counter() - start
        timed = _refuse_slower(config, source, twin, net)
        folded = _measured(net, data, evaluate(net, data, "test", torch.device("cpu")))
        scores = {name: facts.pop("answers") for name, facts in (("dense", dense), ("folded", folded))}
        paired = paired_difference(scores["dense"], scores["folded"])
        folded["widths"] = widths
        tensors = {"dense": tensor_digests(twin), "folded": tensor_digests(net)}
        ledger.append("result", {"arms": {"dense": dense, "folded": folded}, "paired": paired, "tensors": tensors})
        head, n_entries = ledger.head, len(ledger)
    _save(out, source, twin, net, head)
    _time(dense, folded, {"dense": twin, "folded": net}, data, out)
    folded |= {"events": events}
    dense |= {"target_ms": timed[0]} if timed else {}
    folded |= {"target_ms": timed[1]} if timed else {}
    results = {
        "score": score_name(data.task),
        "arms": {"dense": dense, "folded": folded},
        "paired": paired,
        "seconds": seconds,
        "head": head,
        "entries": n_entries,
    }
    run = {"status": "done", "kind": "fold", **facts, "machine": machine(torch.device("cpu")), "results": results}
    return files.write_run(out, run)


def _compress(
    config: OneShotConfig, data: Dataset, model: nn.Module, ledger: Ledger
) -> tuple[list[dict[str, Any]], list[list[Any]], nn.Module]:
    from weightfold.compressor import Compressor
    from weightfold.methods.fold import Fold

    def loss(answer: Any, targets: Tensor) -> Tensor:
        return data.task.loss(getattr(answer, "logits", answer), targets)

    gated = config.max_increase is not None
    settings: dict[str, Any] = {
        name: value for name, value in (("keep", config.keep), ("macs", config.macs)) if value is not None
    }
    if config.tuned is not None:
        settings["liked"] = Tuned.read(config.tuned).all_liked()
    compressor = Compressor(
        model,
        data.task.example(),
        [Fold(**settings)],
        loss=loss if gated else None,
        probe=list(itertools.islice(_batches(config, data), N_PROBE)) if gated else (),
        ledger=ledger,
        seed=config.seed,
        max_increase=config.max_increase or 0.0,
    )
    before = widths_of(compressor.prepare())
    events = [asdict(event) for event in compressor.once(_inputs(config, data))]
    after = {group.name: group.n_channels for group in compressor.graph}
    refused = [event for event in events if not event["group"] or event["kind"] == "refusal"]
    if refused and not any(event["accepted"] for event in events):
        raise DataError(refused[0]["reason"].partition("\n")[0], remedy="Raise --samples, or pass more data.")
    return events, [[name, n, after.get(name, n)] for name, n in before.items()], compressor.convert().eval()


def _refuse_slower(
    config: OneShotConfig, source: Source, dense: nn.Module, net: nn.Module
) -> tuple[float, float] | None:
    """Time both networks on the target, if there is one, and refuse the new one where it is slower."""
    if config.tuned is None:
        return None
    from weightfold.bench.tune import check_not_slower

    table = Tuned.read(config.tuned)
    before, after = (replace(source, model=independent_copy(model).eval()) for model in (dense, net))
    return check_not_slower(before, after, table.target, batch=table.shape[0], threads=table.threads)


def _inputs(config: OneShotConfig, data: Dataset) -> Iterator[Tensor]:
    """Give batches of the wished number of unlabelled inputs."""
    left = config.samples
    for inputs, _ in _batches(config, data):
        if left <= 0:
            return
        yield inputs[:left]
        left -= len(inputs)


def _batches(config: OneShotConfig, data: Dataset) -> Iterator[Batch]:
    return data.batches("train", BATCH, generator=torch.Generator().manual_seed(config.seed))


def _facts(config: OneShotConfig, data: Dataset, model: nn.Module) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
            "task": data.task.model_dump(mode="json"),
        },
        "initial_weights": fingerprint(model),
        "total_steps": 0,
    }


def _measured(model: nn.Module, data: Dataset, score: Score) -> dict[str, Any]:
    return {
        "score": score.value,
        "loss": score.loss,
        "parameters": parameters(model),
        "macs": macs(model, data.task.example(1)),
        "fingerprint": fingerprint(model),
        "widths": [],
        "answers": score,
    }


def _save(out: Path, source: Source, twin: nn.Module, net: nn.Module, head: str) -> None:
    for name, model in ((files.DENSE, twin), (files.MODEL, net)):
        structure = save_model(
            model, out / name, before=source.before, builder=source.builder, inputs=source.inputs, ledger_head=head
        )
    write_structure(structure, out)


def _time(
    dense: dict[str, Any], folded: dict[str, Any], models: dict[str, nn.Module], data: Dataset, out: Path
) -> None:
    models = {name: model.eval() for name, model in models.items()}
    with torch.inference_mode():
        times = {n: latency_ms(models, slice_inputs(data, n, torch.device("cpu"))) for n in LATENCY_BATCHES}
    for name, facts in (("dense", dense), ("folded", folded)):
        facts["file"] = files.MODEL if name == "folded" else files.DENSE
        facts["size_bytes"] = (out / facts["file"]).stat().st_size
        for n in LATENCY_BATCHES:
            facts[f"latency_ms_{n}"] = times[n][name]
