"""Beds of `self_compress.py` and its baselines: data, network, schedule and measure, the same for every arm.

    lenet-300-100    784-300-100-10 with ReLU on MNIST: 266,610 parameters
    lenet-5-caffe    20 and 50 filters of 5×5 without padding, each pooled by 2, then 500 and 10 units, ReLU, on MNIST:
                     431,080 parameters
    resnet9          the built-in network at a quarter of its published width (16 channels first), on the JPEG copy of
                     CIFAR-10, shifted and mirrored: 412,954 parameters
    resnet9-32       the same at half of it: 1,646,122 parameters
    char-gpt         the built-in decoder, 4 blocks of 128 channels, 64 characters at a time, on tiny Shakespeare:
                     809,984 parameters. Measured in bits per character

Images are normalised by mean and deviation; MNIST is not augmented. The schedules of the last two are short, for a CPU:
a dense network is not fully trained by them, and is to be run beside. 2,000 training images (20,000 characters) are
held out of training for decisions, see `probe`; tuning (`tune=True`) looks at 10,000 further training images (at the
next tenth of the text), never at the test set.

    python benchmarks/compress_beds.py --bed lenet-300-100 [--seeds 2] [--steps N] [--tune] [--shared ../shared/data]

trains the dense networks and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.artifact.format import Builder
from weightfold.data import load
from weightfold.data.dataset import Scaling, shift_images, windows
from weightfold.data.text import Vocabulary
from weightfold.models import Classes, ImageInput, NextToken, TaskSpec, TextInput, build

Batch = tuple[Tensor, Tensor]
NAMES = ("lenet-300-100", "lenet-5-caffe", "resnet9", "resnet9-32", "char-gpt")
SHARED = Path(__file__).parents[2] / "shared" / "data"
WIDTHS = {"resnet9": 16, "resnet9-32": 32}
"""Channels of the first layer of a ResNet-9; 64 as published."""
GUARD, TUNE, CONTEXT = 2000, 10_000, 64


@dataclass(frozen=True)
class Schedule:
    """How the dense network of a bed is trained.

    Args:
        steps: of optimisation.
        batch: samples in a step.
        lr: highest learning rate of Adam.
        weight_decay: decoupled (AdamW); 0 is plain Adam.
        warm: share of the steps over which the rate grows from 0.
        flat: share of the steps up to which it then stays; a straight line to 2 % of it follows.
    """

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.0
    warm: float = 0.0
    flat: float = 0.5

    def rate(self, step: int, steps: int | None = None) -> float:
        """Share of the highest learning rate at a step, of `steps` in all.

        Example:
            >>> plan = Schedule(steps=100, batch=1, lr=1.0, flat=0.5)
            >>> [round(plan.rate(step), 2) for step in (0, 50, 75, 100)]
            [1.0, 1.0, 0.51, 0.02]
        """
        place = step / (steps or self.steps)
        if place < self.warm:
            return (step + 1) / max(1.0, self.warm * (steps or self.steps))
        return 1.0 if place <= self.flat else 1 - 0.98 * (place - self.flat) / (1 - self.flat)


SCHEDULES = {
    "lenet-300-100": Schedule(steps=18_000, batch=128, lr=1e-3),
    "lenet-5-caffe": Schedule(steps=6_000, batch=128, lr=1e-3),
    "resnet9": Schedule(steps=2_400, batch=128, lr=4e-3, weight_decay=0.05, warm=0.1, flat=0.1),
    "resnet9-32": Schedule(steps=1_000, batch=128, lr=4e-3, weight_decay=0.05, warm=0.1, flat=0.1),
    "char-gpt": Schedule(steps=2_500, batch=32, lr=2e-3, weight_decay=0.05, warm=0.05, flat=0.3),
}
"""Usual values, chosen for the dense network with hardly any tuning.

CPU minutes of a dense run on one thread: 1, 3, 10, 15 and 7.
"""


@dataclass(frozen=True, eq=False)
class Bed:
    """One network's training and its measure.

    Args:
        builder: how to make the network, for a file that holds its structure.
        task: kind and size of input and output.
        schedule: of the dense network.
        train: inputs as stored, and targets; of a text, its tokens and nothing.
        guard: samples held out of training, in the form that networks take.
        test: samples that results are measured on, in the form that networks take.
        take: makes network inputs of stored ones; varies them if it is given a generator.
        unit: of `accuracy`: `%`, or `bits per character`.
    """

    name: str
    builder: Builder
    task: TaskSpec
    schedule: Schedule
    train: Batch
    guard: Batch
    test: Batch
    take: Callable[[Tensor, torch.Generator | None], Tensor]
    unit: str = "%"

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "%"

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.make(0).parameters())

    @property
    def fp32_bytes(self) -> int:
        """Bytes of all parameters in single precision, without any header."""
        return 4 * self.parameters

    def make(self, seed: int) -> nn.Module:
        """A fresh network; the global random state is left as it was."""
        if self.builder.kind == "built-in":
            return build(self.builder.name, self.task, seed=seed, **self.builder.overrides)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return lenet_300_100() if self.name == "lenet-300-100" else lenet_5_caffe()

    def example(self) -> Tensor:
        """Two inputs, to trace a network with."""
        return self.guard[0][:2].clone()

    def batches(self, seed: int, steps: int | None = None) -> Iterator[Batch]:
        """Batches of a run, drawn by the seed: images in a new order each pass, text from any place."""
        generator = torch.Generator().manual_seed(1000 + seed)
        inputs, targets = self.train
        size = self.schedule.batch
        for idx in _indices(self, len(inputs), size, steps or self.schedule.steps, generator):
            if self.unit != "%":
                pieces = inputs[idx[:, None] + torch.arange(CONTEXT + 1)].long()
                yield pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
            else:
                yield self.take(inputs[idx], generator), targets[idx]

    def probe(self, n: int = GUARD) -> list[Batch]:
        """The first n samples held out of training, in batches of at most 500."""
        inputs, targets = self.guard[0][:n], self.guard[1][:n]
        return list(zip(inputs.split(500), targets.split(500), strict=True))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return self.task.loss(outputs, targets)

    def optimizer(
        self, parameters: Iterable[Any], *, lr: float | None = None, weight_decay: float | None = None
    ) -> torch.optim.Optimizer:
        """AdamW with the bed's settings."""
        plan = self.schedule
        return torch.optim.AdamW(
            parameters,
            lr=plan.lr if lr is None else lr,
            weight_decay=plan.weight_decay if weight_decay is None else weight_decay,
        )

    def accuracy(self, model: nn.Module, samples: list[Batch] | None = None) -> float:
        """Per cent right, or bits per character, on the test set or on other samples; the mode is left as it was."""
        was = model.training
        model.eval()
        total, n = 0.0, 0
        with torch.no_grad():
            for x, y in samples or zip(self.test[0].split(500), self.test[1].split(500), strict=True):
                outputs = model(x)
                if self.unit == "%":
                    total += 100 * float((outputs.argmax(1) == y).sum())
                else:
                    total += float(F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum")) / math.log(2)
                n += y.numel()
        model.train(was)
        return total / n


def _indices(bed: Bed, n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    if bed.unit != "%":
        for _ in range(steps):
            yield torch.randint(n - CONTEXT, (size,), generator=generator)
        return
    done = 0
    while done < steps:
        for idx in torch.randperm(n, generator=generator).split(size)[: n // size][: steps - done]:
            yield idx
            done += 1


# networks -------------------------------------------------------------------------------------------------------------


def lenet_300_100() -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998), with ReLU as in the compression literature."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def lenet_5_caffe() -> nn.Module:
    """LeNet-5 as in Caffe's examples; differs in: ReLU after the convolutions too, as in Han et al. 2015."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10),
    )  # fmt: skip


def _function(name: str) -> Builder:
    return Builder(kind="function", name=f"benchmarks.compress_beds:{name}")


# data -----------------------------------------------------------------------------------------------------------------


def open_bed(name: str, shared: Path = SHARED, *, tune: bool = False, cache: Path | None = None) -> Bed:
    """Load a bed.

    Args:
        shared: folder of the data sets.
        tune: whether to measure on held-out training samples in place of the test set, and to train without them.
        cache: folder that keeps decoded images for the next time.
    """
    if name not in NAMES:
        raise SystemExit(f"There is no bed '{name}'. Beds: {', '.join(NAMES)}.")
    coloured = name in WIDTHS
    need = {"char-gpt": "text/tinyshakespeare.txt", **dict.fromkeys(WIDTHS, "cifar10-jpeg-train.parquet")}
    if not (shared / need.get(name, "mnist-train.parquet")).is_file():
        raise SystemExit(f"The bed {name} needs {need.get(name, 'mnist-train.parquet')}; pass its folder as --shared.")
    if name == "char-gpt":
        return _text_bed(name, shared / need[name], tune)
    source = "cifar10-jpeg" if coloured else "mnist"
    x, y, test_x, test_y = _images(shared / f"{source}-train.parquet", cache)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held = order[GUARD : GUARD + TUNE] if tune else order[:0]
    guard, rest = order[:GUARD], order[GUARD + len(held) :]
    if tune:
        test_x, test_y = x[held], y[held]
    scaling = Scaling.of_images(x)
    if coloured:
        take, task = _coloured(scaling), _image_task(3, 32)
        width = {"width": WIDTHS[name]}
        builder = Builder(kind="built-in", name="resnet9", task=task.model_dump(mode="json"), overrides=width)
        train = x[rest], y[rest]
    else:
        take, task = _channels_last, _image_task(1, 28)
        builder = _function(name.replace("-", "_"))
        train = _normalised(x[rest], scaling), y[rest]
    guard_x, test_x = _normalised(x[guard], scaling), _normalised(test_x, scaling)
    return Bed(name, builder, task, SCHEDULES[name], train, (guard_x, y[guard]), (test_x, test_y), take)


def _image_task(channels: int, side: int) -> TaskSpec:
    return TaskSpec(input=ImageInput(channels=channels, height=side, width=side), output=Classes(n=10))


def _plain(x: Tensor, _: torch.Generator | None) -> Tensor:
    return x


def _coloured(scaling: Scaling) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    def take(x: Tensor, generator: torch.Generator | None) -> Tensor:
        moved = x if generator is None else shift_images(x, generator, mirror=True)
        return _normalised(moved, scaling)

    return take


def _normalised(images: Tensor, scaling: Scaling) -> Tensor:
    """Mean 0 and deviation 1 over the training set, channels last: convolutions on a CPU are faster so."""
    return _channels_last(scaling.apply(images / 255), None)


def _channels_last(x: Tensor, _: torch.Generator | None) -> Tensor:
    """Order the memory by place, then channel; torch sees it for one channel only if the strides say so."""
    x = x.contiguous(memory_format=torch.channels_last)
    _, channels, height, width = x.shape
    return x.as_strided(x.shape, (channels * height * width, 1, channels * width, channels))


def _images(path: Path, cache: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and classes, test images and classes."""
    kept = cache / f"{path.stem}.safetensors" if cache else None
    if kept is not None and kept.is_file():
        found = load_file(kept)
        return found["x"], found["y"], found["test_x"], found["test_y"]
    data = load(path, val_share=0.01)
    x, y = torch.cat([data.train.inputs, data.val.inputs]), torch.cat([data.train.targets, data.val.targets])
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x, "y": y, "test_x": data.test.inputs, "test_y": data.test.targets}, kept)
    return x, y, data.test.inputs, data.test.targets


def _text_bed(name: str, path: Path, tune: bool) -> Bed:
    """The last tenth of the text is the test set; the 20,000 characters before it are the guard."""
    text = path.read_text(encoding="utf-8")
    cut = round(0.9 * len(text))
    tenth = len(text) - cut
    learn = cut - 20_000 - (tenth if tune else 0)
    vocabulary = Vocabulary.of(text[:learn])
    parts = [text[:learn], text[learn : learn + 20_000], text[learn + 20_000 :][:tenth]]
    train, guard, test = (vocabulary.encode(part) for part in parts)
    n = len(vocabulary.characters)
    task = TaskSpec(input=TextInput(vocab=n, context=CONTEXT), output=NextToken(vocab=n))
    held = [(split.inputs.long(), split.targets.long()) for split in (windows(guard, CONTEXT), windows(test, CONTEXT))]
    builder = Builder(kind="built-in", name=name, task=task.model_dump(mode="json"))
    unit = "bits per character"
    return Bed(name, builder, task, SCHEDULES[name], (train, train[:0]), held[0], held[1], _plain, unit)


# the dense network ----------------------------------------------------------------------------------------------------


def train_dense(bed: Bed, seed: int, steps: int | None = None) -> tuple[nn.Module, float]:
    """The dense network after its schedule, and the CPU seconds that took."""
    total = steps or bed.schedule.steps
    start = time.process_time()
    model = bed.make(seed).train()
    optimizer = bed.optimizer(model.parameters())
    for step, (x, y) in enumerate(bed.batches(seed, total)):
        for group in optimizer.param_groups:
            group["lr"] = bed.schedule.lr * bed.schedule.rate(step, total)
        optimizer.zero_grad()
        bed.loss(model(x), y).backward()
        optimizer.step()
    return model.eval(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=NAMES, required=True)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--cache", type=Path, help="folder that keeps decoded images for the next time")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bed = open_bed(args.bed, args.shared, tune=args.tune, cache=args.cache)
    rows = []
    for seed in range(args.seeds):
        model, seconds = train_dense(bed, seed, args.steps)
        rows.append({"seed": seed, "accuracy": round(bed.accuracy(model), 3), "cpu_seconds": round(seconds, 1)})
        print(rows[-1], file=sys.stderr, flush=True)
    print(
        json.dumps(
            {
                "bed": bed.name,
                "unit": bed.unit,
                "on": "held-out training samples" if args.tune else "test",
                "steps": args.steps or bed.schedule.steps,
                "fp32_bytes": bed.fp32_bytes,
                "accuracy_mean": round(statistics.mean(r["accuracy"] for r in rows), 3),
                "rows": rows,
                "threads": args.threads,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
