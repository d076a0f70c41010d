"""Inference on the CPU: networks made smaller, beside the dense ones, in the runtimes that run them.

    python benchmarks/inference.py --shared ../shared/data [--models lenet5 resnet20 ...] [--out FILE]

Each network is trained (or taken trained), folded to widths that convolution kernels like, and trained on with
self-compression, which leaves whole numbers of few bits; the dense one is trained on for as many steps. Both are
written as ONNX, the dense one also by ONNX Runtime's own static 8-bit quantisation, calibrated on the same inputs,
with signed and unsigned activations: the quicker one counts. All files are then timed in turns on one thread, warm,
in one process. A network without training data here (`bert`) has random weights: its times count, its
accuracy is null. Trainings are short, for a shared machine; what they reach is stated with each row.

    rows    model, target, batch, dense_ms, compressed_ms, ort_int8_ms, bytes, fp32_bytes, accuracy_delta

dense_ms is the dense network's fp32 in the same runtime (ONNX Runtime's for both ONNX targets), all times medians;
bytes are those of the target's own file, for torch those of the packed file; accuracy_delta is in points of test
accuracy, the file in its runtime less the dense module. `speedup` and `over_ort_int8` are medians of paired ratios. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.artifact import Builder, Input, write_json
from weightfold.bench.timing import interleaved, ratio, this_machine
from weightfold.compressor import Compressor
from weightfold.data import Dataset, load, load_weights_
from weightfold.export import Blueprint, Source, export, save_packed
from weightfold.export.example import draw, task_input
from weightfold.methods.fold import Fold
from weightfold.methods.prune import Prune
from weightfold.methods.self_compress import SelfCompress
from weightfold.models import Classes, ImageInput, TaskSpec, build
from weightfold.runtime import load_file, require
from weightfold.size import file_bytes, unique_state
from weightfold.training.measure import evaluate

CPU = torch.device("cpu")
COLOUR = TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10))


@dataclass(frozen=True)
class Plan:
    """How one network of the table comes about.

    Args:
        data: below the shared folder, or built in; None: no training.
        limit: samples.
        dense_epochs: of the dense network.
        epochs: of self-compression.
        batch: samples a step.
        lr: first learning rate of AdamW; a quarter of it for a network that has been trained.
        fold: settings of the fold, or of pruning where nothing is observed.
        target: size of the packed file, as a share of the dense fp32.
        weights: trained ones, below the shared folder.
        batches: inputs a call.
        rounds: of timing, by inputs a call, where a call takes seconds; otherwise as many as the time allows.
        most_steps: of any one training: what a shared machine can spare.
    """

    data: str | None
    limit: int | None = None
    dense_epochs: int = 4
    epochs: int = 6
    batch: int = 64
    lr: float = 2e-3
    fold: dict[str, Any] = field(default_factory=dict)
    target: float = 0.045
    weights: str | None = None
    batches: tuple[int, ...] = (1, 64)
    rounds: Mapping[int, int] = field(default_factory=dict)
    most_steps: int = 150


PLANS = {
    "lenet5": Plan("mnist-train.parquet", 8000, 6, 10, fold={"keep": 0.6}, most_steps=700),
    "vgg-small": Plan("mnist-train.parquet", 12000, 3, 3, fold={"keep": 0.3, "align": 16}, most_steps=500),
    "resnet20": Plan(
        "cifar10-jpeg-train.parquet",
        10000,
        1,
        4,
        fold={"macs": 0.5, "align": 8, "floor": 0.25},
        most_steps=300,
        weights="cifar10-resnets/resnet20.safetensors",
    ),
    "vit-tiny": Plan(
        "digits", None, 16, 16, lr=1e-3, fold={"keep": 0.25, "align": 16, "groups": "*fc1*"}, most_steps=320
    ),
    "char-gpt": Plan("text/tinyshakespeare.txt", None, 1, 1, fold={"keep": 0.25, "groups": "*fc1*"}, most_steps=60),
    "resnet9": Plan("cifar10-jpeg-train.parquet", 20000, 2, 2, fold={"keep": 0.5, "align": 16}, most_steps=400),
    "bert": Plan(None, fold={"keep": 0.25, "align": 64, "groups": "*intermediate*"}, rounds={64: 2}),
}

# networks -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Pair:
    """A dense network, the compressed one, and what is known of them."""

    dense: Source
    small: Source
    data: Dataset | None
    note: str
    seconds: float


def made(name: str, plan: Plan, shared: Path) -> Pair:
    """Train, fold, compress."""
    start = time.perf_counter()
    if plan.data is None:
        return untrained(name, plan, start)
    path = plan.data if plan.data == "digits" else str(shared / plan.data)
    data = load(path, seed=0, limit=plan.limit)
    dense = build(name, data.task, seed=0)
    if plan.weights:
        load_weights_(dense, shared / plan.weights)
        lr = plan.lr / 4
    else:
        lr = plan.lr
    before = Blueprint.of(dense)
    builder = Builder(kind="built-in", name=name, task=data.task.model_dump(mode="json"))
    steps = min(plan.most_steps, plan.dense_epochs * math.ceil(len(data.train) / plan.batch))
    fit(dense, data, plan, steps, lr)
    small = copy.deepcopy(dense)
    folded(small, data, plan)
    more = min(plan.most_steps, plan.epochs * math.ceil(len(data.train) / plan.batch))
    small, method = fit(small, data, plan, more, plan.lr / 2, compress=file_bytes(unique_state(dense)) * plan.target)
    fit(dense, data, plan, more, plan.lr / 2)
    assert method is not None
    assert method.result is not None
    inputs = (task_input(data.task),)
    calibration = real_inputs(data)
    source = Source(dense.eval(), inputs, before, builder, calibration=calibration)
    note = f"{len(data.train)} training samples; dense {steps} steps"
    note += f" from the published weights, then {more} more; folded {plan.fold} after {steps}, then {more} steps of "
    note += f"self-compression to {plan.target:.1%} of the dense fp32"
    return Pair(
        source,
        replace(source, model=small.eval(), coded=method.result.coded),
        data,
        note if plan.weights else note.replace(" from the published weights", ""),
        time.perf_counter() - start,
    )


def real_inputs(data: Dataset) -> list[Any]:
    batches = data.batches("train", 32, generator=torch.Generator().manual_seed(0))
    return [((x,), {}) for x, _ in itertools.islice(batches, 8)]


def fit(
    model: nn.Module, data: Dataset, plan: Plan, steps: int, lr: float, compress: float | None = None
) -> tuple[nn.Module, SelfCompress | None]:
    """Train on half a cosine; with `compress`, down to so many bytes, with the widths as they are."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    method = None if compress is None else SelfCompress(target=int(compress), remove=False, at=0.05, reach=0.6)
    compressor = None
    if method is not None:
        compressor = Compressor(model, data.task.example(), [method], total_steps=steps)
        compressor.prepare(optimizer)
    epochs = (data.batches("train", plan.batch, generator=torch.Generator().manual_seed(e)) for e in itertools.count())
    for step, (x, y) in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        loss = data.task.loss(model(x), y)
        if compressor is not None:
            loss = loss + compressor.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if compressor is not None:
            compressor.step()
    return (model if compressor is None else compressor.convert()).eval(), method


def folded(model: nn.Module, data: Dataset, plan: Plan) -> None:
    """Fold at once, by unlabelled training inputs."""
    compressor = Compressor(model.eval(), data.task.example(), [Fold(**plan.fold)])
    compressor.prepare()
    compressor.once(x for (x,), _ in real_inputs(data) * 2)
    compressor.convert()


def untrained(name: str, plan: Plan, start: float) -> Pair:
    """A network of random weights, narrowed by magnitude: for its times alone."""
    torch.manual_seed(0)
    if name == "bert":
        transformers = require("transformers")
        config = transformers.BertConfig(attn_implementation="sdpa")
        dense: nn.Module = Encoder(transformers.BertModel(config, add_pooling_layer=False))
        inputs: tuple[Input, ...] = (Input(shape=(1, 128), dtype="int64", high=30000),)
        example = torch.zeros(1, 128, dtype=torch.long)
    else:
        dense = build(name, COLOUR, seed=0)
        inputs, example = (task_input(COLOUR),), COLOUR.example()
    source = Source(dense.eval(), inputs, Blueprint.of(dense), Builder(kind="instance", name=name))
    small = copy.deepcopy(dense)
    compressor = Compressor(small, example, [Prune(**plan.fold)])
    compressor.prepare()
    compressor.once()
    narrow = replace(source, model=compressor.convert().eval())
    return Pair(source, narrow, None, f"random weights, pruned {plan.fold}", time.perf_counter() - start)


class Encoder(nn.Module):
    """The last hidden states of an encoder."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids).last_hidden_state


# files and times ------------------------------------------------------------------------------------------------------


def ort_static(dense: Path, out: Path, calibration: list[dict[str, Any]], kind: str) -> None:
    """ONNX Runtime's own static quantisation, with its defaults, a scale for each channel, activations of a type."""
    quantization = require("onnxruntime.quantization")
    feed = iter(calibration)

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(feed, None)

    activation = getattr(quantization.QuantType, kind)
    quantization.quantize_static(str(dense), str(out), Reader(), per_channel=True, activation_type=activation)


def files(pair: Pair, folder: Path) -> dict[str, Path]:
    """Write every file; a target that cannot be written is left out."""
    found = {"dense": folder / "dense.onnx", "small": folder / "small.onnx", "small_int8": folder / "small8.onnx"}
    export(pair.dense, "onnx", found["dense"])
    export(pair.small, "onnx", found["small"])
    export(pair.small, "onnx-int8", found["small_int8"], tolerance=1.0)
    name = load_file(found["dense"]).slots[0].name
    given = pair.dense.calibration or [draw(pair.dense.inputs, seed=s) for s in range(2)]
    feed = [{name: args[0].numpy()} for args, _ in given]
    for kind in ("QInt8", "QUInt8"):
        found[f"ort_{kind}"] = folder / f"dense_{kind}.onnx"
        ort_static(found["dense"], found[f"ort_{kind}"], feed, kind)
    if importlib.util.find_spec("openvino"):
        for who, source in (("dense", pair.dense), ("small", pair.small)):
            found[f"{who}_openvino"] = folder / f"{who}.xml"
            export(source, "openvino", found[f"{who}_openvino"])
    return found


def scored(run: Callable[[Any], Any], data: Dataset) -> float:
    """Test accuracy in points."""

    class Called(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return run(x)

    return 100 * evaluate(Called(), data, "test", CPU).value


def measure(name: str, pair: Pair, plan: Plan, seconds: float) -> list[dict[str, Any]]:
    """All rows of one network."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = files(pair, folder)
        loaded = {key: load_file(path, threads=1) for key, path in paths.items()}
        sizes = {key: path.stat().st_size for key, path in paths.items()}
        for key in [key for key in sizes if key.endswith("openvino")]:
            sizes[key] += paths[key].with_suffix(".bin").stat().st_size
        fp32_bytes = file_bytes(unique_state(pair.dense.model))
        packed = (
            save_packed(pair.small, pair.small.coded, folder / "s.wfp").total_bytes
            if pair.small.coded
            else file_bytes(unique_state(pair.small.model))
        )
        accuracy = accuracies(pair, loaded)
        for batch in plan.batches:
            (x,), _ = draw([replace_name(pair.dense.inputs[0])], batch=batch)
            calls: dict[str, Any] = {k: partial(run, x.numpy()) for k, run in loaded.items()}
            calls |= {k: call(s.model, x) for k, s in (("dense_torch", pair.dense), ("small_torch", pair.small))}
            times = interleaved(calls, seconds=seconds * len(calls), rounds=plan.rounds.get(batch))
            rival = min(("ort_QInt8", "ort_QUInt8"), key=lambda key: times[key].p50)
            for target, dense, small, n_bytes in (
                ("torch", "dense_torch", "small_torch", packed),
                ("onnx", "dense", "small", sizes["small"]),
                ("onnx-int8", "dense", "small_int8", sizes["small_int8"]),
                ("openvino", "dense_openvino", "small_openvino", sizes.get("small_openvino", 0)),
            ):
                if small not in times:
                    continue
                key = "small_int8" if target == "onnx-int8" else "small"
                rows.append(
                    {
                        "model": name,
                        "target": target,
                        "batch": batch,
                        "dense_ms": round(times[dense].p50, 4),
                        "compressed_ms": round(times[small].p50, 4),
                        "ort_int8_ms": round(times[rival].p50, 4),
                        "bytes": n_bytes,
                        "fp32_bytes": fp32_bytes,
                        "accuracy_delta": None if accuracy is None else round(accuracy[key] - accuracy["dense"], 2),
                        "speedup": round(ratio(times[dense], times[small]), 3),
                        "over_ort_int8": round(ratio(times[rival], times[small]), 3),
                        "dense_accuracy": None if accuracy is None else round(accuracy["dense"], 2),
                        "ort_int8_accuracy_delta": None
                        if accuracy is None
                        else round(accuracy[rival] - accuracy["dense"], 2),
                        "ort_int8_is": rival.removeprefix("ort_"),
                        "packed_bytes": packed,
                        "packed_share": round(packed / fp32_bytes, 4),
                        "rounds": len(times[small].ms),
                    }
                )
                say(rows[-1])
    return rows


def accuracies(pair: Pair, loaded: Mapping[str, Any]) -> dict[str, float] | None:
    if pair.data is None:
        return None
    found = {key: scored(loaded[key], pair.data) for key in ("small_int8", "ort_QInt8", "ort_QUInt8")}
    return found | {"dense": scored(pair.dense.model, pair.data), "small": scored(pair.small.model, pair.data)}


def replace_name(item: Input) -> Input:
    return item.model_copy(update={"name": None})


def call(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def say(row: Mapping[str, Any]) -> None:
    print(
        f"{row['model']} {row['target']} batch {row['batch']}: dense {row['dense_ms']} ms, compressed "
        f"{row['compressed_ms']} ms ({row['speedup']}x; {row['over_ort_int8']}x ORT int8), {row['bytes']:,} of "
        f"{row['fp32_bytes']:,} bytes, accuracy {row['accuracy_delta']} of {row['dense_accuracy']}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, for each file and batch size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("torch", "onnx", "onnxruntime", "openvino")
    versions = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    result: dict[str, Any] = {
        "machine": this_machine(),
        "threads": 1,
        "versions": versions,
        "notes": {},
        "missing": {},
        "rows": [],
    }
    for name in args.models:
        try:
            pair = made(name, PLANS[name], args.shared)
            result["notes"][name] = f"{pair.note}; {pair.seconds:.0f} s to make"
            result["rows"] += measure(name, pair, PLANS[name], args.seconds)
        except Exception as error:  # one network's failure must not cost the others' rows
            result["missing"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            print(f"{name}: {result['missing'][name]}", file=sys.stderr, flush=True)
        if args.out is not None:
            write_json(args.out, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
