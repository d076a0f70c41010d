"""The published recipe of self-compression, as a baseline: its quantiser, its loss, its optimiser, no extras.

    q(x, b, e) = 2**e * round(min(max(2**-e * x, -2**(b-1)), 2**(b-1) - 1))

with one real pair (b, e) for each output channel, ties to even, and a straight-through gradient of the rounding alone.
The loss is the task's plus gamma times the average bits of an original weight, each layer's size being

    simple  (eq 4)  I H W sum_i b_i
    coupled (eq 5)  H W (#{j: b'_j > 0} sum_i b_i + #{i: b_i > 0} sum_j b'_j),  b' the bits of the producing layer

Adam, learning rate 0.5 and eps 1e-3 for b and e, 1e-3 and 1e-5 for the rest; b starts at 8 and is kept at 0 or above.
An L1 penalty acts on the biases of channels of 0 bits (beta, behind a batch norm); such a channel is cut out, with its
consumer's weights and its optimiser state, once its bias is below one step of Adam. Channels behind an addition are
counted as the paper does: a consumer reads the union of what its producers keep.

Not in the paper, and chosen here: the weight of the L1 penalty (0.01), the learning rate's course (the bed's own, for
both groups), batches of 512 images for as many samples as the bed's schedule takes (its 128 did worse: 97.5 % in
16.0 kB against 97.6 % in 13.9 kB, coded, on lenet-300-100), weight decay 5e-4 on resnet9 alone (the paper's value), and
the start of e (2**(b-1) steps reach the largest weight). Bits act on the rows of embeddings too. Three sizes are
reported:

    billed   sum of b times the kept weights, nothing else: as the paper counts
    packed   whole bits for as many values as a channel's grid has, and per kept channel 4 bits for their number, 16 for
             the step, 16 for the bias (batch norm folded), a bit per original channel for which are kept, 8 bytes for
             each layer and 16 for the file. Other parameters (LayerNorm) take 16 bits each
    coded    the same with each layer's codes of one width by the shortest of packed bits, zlib, and an adaptive
             arithmetic coder of order 0 (its code length, rounded up to bytes)

    python benchmarks/baselines/paper_self_compression.py --bed lenet-300-100 --gamma 0.05 [--size eq5] [--seeds 1]
    python benchmarks/baselines/paper_self_compression.py --bed lenet-300-100 --accuracy 98.1 | --bytes 7000

The last two search gamma by bisection. The last line is JSON.

Reference: Cséfalvay & Imber 2023, arXiv 2301.13142.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compress_beds import NAMES, SHARED, Bed, open_bed

Size = Literal["eq4", "eq5"]
START_BITS, L1, CUT_EVERY = 8.0, 0.01, 200
WIDTH_BITS, STEP_BITS, BIAS_BITS, LAYER_BYTES, FILE_BYTES = 4, 16, 16, 8, 16


class Round(torch.autograd.Function):
    """Round to the nearest, ties to even; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return gradient


class Quantiser(nn.Module):
    """The paper's q(x, b, e), one pair for each slice along the first dimension."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.full((len(weight),), START_BITS))
        top = weight.detach().flatten(1).abs().amax(1).clamp_min(1e-8)
        self.e = nn.Parameter(top.log2() - (START_BITS - 1))

    def forward(self, weight: Tensor) -> Tensor:
        column = (-1,) + (1,) * (weight.ndim - 1)
        b, e = self.b.view(column), self.e.view(column)
        half = 2 ** (b - 1)
        return 2**e * Round.apply(torch.minimum(torch.maximum(2**-e * weight, -half), half - 1))

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Whole numbers from 0 of each weight, the numbers of values of the channels, and the number that means zero.

        Example:
            >>> codes, n_values, zero = Quantiser(torch.tensor([[-1.0, 0.5]])).codes(torch.tensor([[-1.0, 0.5]]))
            >>> codes.tolist(), n_values.tolist(), zero.tolist()
            ([[0, 192]], [256], [128])
        """
        half = 2 ** (self.b - 1)
        low, high = (-half).round(), (half - 1).round().clamp_min(0)
        low = torch.minimum(low, torch.zeros_like(low))
        column = (-1,) + (1,) * (weight.ndim - 1)
        half_O, step_O = half.view(column), (2**self.e).view(column)
        number = torch.minimum(torch.maximum(weight / step_O, -half_O), half_O - 1)
        return (number.round() - low.view(column)).long(), (high - low).long() + 1, -low.long()


@dataclass
class Layer:
    """One quantised tensor in its network.

    Args:
        path: of the module whose `weight` is quantised.
        norm: path of the batch norm behind it, or "".
        reads: paths of the layers whose sum it reads; empty for the network's input and for streams that stay whole.
        alone: whether its channels can be cut out: no addition, read by one layer.
        n_out: original channels.
        weights: original weights.
    """

    path: str
    norm: str = ""
    reads: tuple[str, ...] = ()
    alone: bool = False
    n_out: int = 0
    weights: int = 0
    kept_idx: Tensor | None = None


def layers_of(bed: Bed, model: nn.Module) -> list[Layer]:
    """The layers of a bed and who reads whom."""
    if bed.name == "lenet-300-100":
        found = [Layer("1", alone=True), Layer("3", reads=("1",), alone=True), Layer("5", reads=("3",))]
    elif bed.name == "lenet-5-caffe":
        found = [Layer("0", alone=True), Layer("3", reads=("0",), alone=True)]
        found += [Layer("7", reads=("3",), alone=True), Layer("9", reads=("7",))]
    elif bed.name.startswith("resnet9"):
        one, three = ("layer1.0", "res1.1.0"), ("layer3.0", "res3.1.0")
        found = [
            Layer("prep.0", "prep.1", alone=True),
            Layer("layer1.0", "layer1.1", ("prep.0",)),
            Layer("res1.0.0", "res1.0.1", ("layer1.0",), alone=True),
            Layer("res1.1.0", "res1.1.1", ("res1.0.0",)),
            Layer("layer2.0", "layer2.1", one, alone=True),
            Layer("layer3.0", "layer3.1", ("layer2.0",)),
            Layer("res3.0.0", "res3.0.1", ("layer3.0",), alone=True),
            Layer("res3.1.0", "res3.1.1", ("res3.0.0",)),
            Layer("head", "", three),
        ]
    else:
        found = [Layer("token"), Layer("position")]
        for k in range(len(model.blocks)):
            block = f"blocks.{k}"
            found += [Layer(f"{block}.attn.qkv"), Layer(f"{block}.attn.proj"), Layer(f"{block}.mlp.fc1", alone=True)]
            found += [Layer(f"{block}.mlp.fc2", reads=(f"{block}.mlp.fc1",))]
    for layer in found:
        weight = model.get_submodule(layer.path).weight
        layer.n_out, layer.weights = len(weight), weight.numel()
        layer.kept_idx = torch.arange(layer.n_out)
    return found


class Compressed:
    """A network under the paper's recipe."""

    def __init__(self, bed: Bed, model: nn.Module, size: Size, weight_decay: float) -> None:
        self.model, self.size = model, size
        self.layers = layers_of(bed, model)
        for layer in self.layers:
            module = model.get_submodule(layer.path)
            parametrize.register_parametrization(module, "weight", Quantiser(module.weight))
        self.n_weights = sum(layer.weights for layer in self.layers)
        own = {id(p) for layer in self.layers for p in self.quantiser(layer).parameters()}
        weights = {id(self.original(layer)) for layer in self.layers}
        every = list(model.parameters())
        groups = [
            {"params": [p for p in every if id(p) in own], "lr": 0.5, "eps": 1e-3},
            {"params": [p for p in every if id(p) in weights], "weight_decay": weight_decay},
            {"params": [p for p in every if id(p) not in own | weights]},
        ]
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=1e-3, eps=1e-5)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def quantiser(self, layer: Layer) -> Quantiser:
        return self.model.get_submodule(layer.path).parametrizations.weight[0]

    def original(self, layer: Layer) -> nn.Parameter:
        return self.model.get_submodule(layer.path).parametrizations.weight.original

    def bias(self, layer: Layer) -> nn.Parameter | None:
        return getattr(self.model.get_submodule(layer.norm or layer.path), "bias", None)

    def producers_bits(self, layer: Layer) -> Tensor | None:
        """Bits of each channel that the layer reads: the most among the summands."""
        if not layer.reads:
            return None
        found = [self.quantiser(self.by_path(path)).b for path in layer.reads]
        return torch.stack(found).amax(0)

    def by_path(self, path: str) -> Layer:
        return next(layer for layer in self.layers if layer.path == path)

    def average_bits(self) -> Tensor:
        """The paper's Q: bits per original weight, by eq 4 or eq 5."""
        total = torch.zeros(())
        for layer in self.layers:
            bits, weight = self.quantiser(layer).b, self.original(layer)
            sources = self.producers_bits(layer) if self.size == "eq5" else None
            if sources is None:
                total = total + weight[0].numel() * bits.sum()
                continue
            area = weight[0].numel() / len(sources)
            alive = (sources > 0).sum() * bits.sum() + (bits > 0).sum() * sources.sum()
            total = total + area * alive
        return total / self.n_weights

    def bias_penalty(self) -> Tensor:
        """L1 norm of the biases of channels of 0 bits, but for the outputs."""
        total = torch.zeros(())
        for layer in self.layers:
            bias = self.bias(layer)
            if bias is not None and (layer.alone or layer.norm):
                total = total + bias[self.quantiser(layer).b.detach() == 0].abs().sum()
        return total

    @torch.no_grad()
    def clamp(self) -> None:
        for layer in self.layers:
            self.quantiser(layer).b.clamp_(min=0)

    # removal

    def dead(self, layer: Layer) -> Tensor:
        """Channels of 0 bits whose bias has reached 0."""
        bias = self.bias(layer)
        gone = self.quantiser(layer).b.detach() == 0
        return gone if bias is None else gone & (bias.detach().abs() < self.rates[-1])

    @torch.no_grad()
    def cut(self) -> None:
        """Take dead channels out of every layer that is alone, at least one staying."""
        for layer in self.layers:
            if not layer.alone:
                continue
            keep = ~self.dead(layer)
            if keep.all() or not keep.any():
                continue
            idx = keep.nonzero().flatten()
            q = self.quantiser(layer)
            for parameter in (self.original(layer), q.b, q.e, self.bias(layer)):
                self.slice(parameter, idx, 0)
            if layer.norm:
                norm = self.model.get_submodule(layer.norm)
                self.slice(norm.weight, idx, 0)
                norm.running_mean, norm.running_var = norm.running_mean[idx], norm.running_var[idx]
            for reader in self.layers:
                if layer.path in reader.reads:
                    weight = self.original(reader)
                    each = weight.shape[1] // len(keep)
                    self.slice(weight, (idx[:, None] * each + torch.arange(each)).flatten(), 1)
            layer.kept_idx = layer.kept_idx[idx]

    def slice(self, parameter: Tensor | None, idx: Tensor, dim: int) -> None:
        if parameter is None:
            return
        shape = parameter.shape
        parameter.data = parameter.data.index_select(dim, idx)
        parameter.grad = None
        for name, value in self.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == shape:
                self.optimizer.state[parameter][name] = value.index_select(dim, idx)

    # what is left

    def kept_inputs(self, layer: Layer) -> int:
        """Weights of one output channel that a file must hold."""
        n_in = self.original(layer)[0].numel()
        if not layer.reads:
            return n_in
        dead = torch.stack([self.dead(self.by_path(path)) for path in layer.reads]).all(0)
        return n_in // len(dead) * int((~dead).sum())

    def sizes(self) -> dict[str, Any]:
        """Bytes as billed, packed and coded, and the share of weights kept."""
        billed, packed, coded, kept = 0.0, 0, 0, 0
        loose = {id(p) for p in self.model.parameters()}
        for layer in self.layers:
            q, bias = self.quantiser(layer), self.bias(layer)
            loose -= {id(p) for p in (self.original(layer), q.b, q.e, bias)}
            if layer.norm:
                loose -= {id(self.model.get_submodule(layer.norm).weight)}
            live = q.b.detach() > 0
            units = int((~self.dead(layer)).sum()) if layer.alone or layer.norm else len(live)
            codes = self.kept_codes(layer)
            billed += float(q.b.detach()[live].sum()) * self.kept_inputs(layer)
            kept += int(live.sum()) * self.kept_inputs(layer)
            side = WIDTH_BITS + STEP_BITS + (BIAS_BITS if bias is not None else 0)
            fixed = LAYER_BYTES + math.ceil((units * side + layer.n_out) / 8)
            packed += fixed + sum(math.ceil(len(rows) * bits / 8) for bits, rows in codes)
            coded += fixed + sum(coded_bytes(rows, bits) for bits, rows in codes)
        rest = 2 * sum(p.numel() for p in self.model.parameters() if id(p) in loose)
        return {
            "billed_bytes": round(billed / 8),
            "packed_bytes": packed + rest + FILE_BYTES,
            "coded_bytes": coded + rest + FILE_BYTES,
            "weights_kept": round(kept / self.n_weights, 5),
        }

    def kept_codes(self, layer: Layer) -> list[tuple[int, np.ndarray]]:
        """Codes of the channels of each width, in one row; zero is the value 0 mod the number of values."""
        q = self.quantiser(layer)
        codes, n_values, zero = q.codes(self.original(layer).detach())
        codes = codes.flatten(1)
        if layer.reads:
            live = ~torch.stack([self.dead(self.by_path(path)) for path in layer.reads]).all(0)
            codes = codes[:, live.repeat_interleave(codes.shape[1] // len(live))]
        codes = (codes - zero[:, None]) % n_values[:, None]
        widths = (n_values - 1).apply_(lambda n: int(n).bit_length())
        live = q.b.detach() > 0
        return [(bits, codes[live & (widths == bits)].flatten().numpy()) for bits in sorted(set(widths[live].tolist()))]

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Put what a file would hold in the network: weights of half-precision steps, half-precision biases."""
        for layer in self.layers:
            q = self.quantiser(layer)
            q.e.copy_((2**q.e).half().float().clamp_min(1e-7).log2())
            module = self.model.get_submodule(layer.path)
            parametrize.remove_parametrizations(module, "weight")
        for parameter in self.model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(parameter.half().float())
        return self.model


def coded_bytes(codes: np.ndarray, bits: int) -> int:
    """Bytes of codes of one width: the least of packed bits, zlib, and adaptive arithmetic coding; one byte says which.

    The adaptive coder starts from a count of 1/2 of each value (Krichevsky & Trofimov 1981): its code length is exact.

    Example:
        >>> coded_bytes(np.array([0] * 500 + [3] * 12), 2)
        11
    """
    if not len(codes) or bits == 0:
        return 0
    wide = codes.astype(np.uint8 if bits <= 8 else np.uint16).tobytes()
    deflated = min(len(_deflated(wide, s)) for s in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY))
    counts = np.bincount(codes, minlength=2**bits)
    length = math.lgamma(len(codes) + 2**bits / 2) - math.lgamma(2**bits / 2)
    length -= sum(math.lgamma(n + 0.5) - math.lgamma(0.5) for n in counts.tolist())
    adaptive = math.ceil((length / math.log(2) + 2) / 8)
    return 1 + min(math.ceil(len(codes) * bits / 8), deflated, adaptive)


def _deflated(data: bytes, strategy: int) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
    return coder.compress(data) + coder.flush()


def run(
    bed: Bed, gamma: float, steps: int | None = None, seed: int = 0, *, size: Size = "eq4",
    weight_decay: float | None = None, batch: int | None = None, trace: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train once from scratch.

    Args:
        gamma: weight of the average bits of an original weight; the paper's range is 0.001 to 0.316.
        steps: of training; by default as many as take the samples of the bed's own schedule.
        size: which of the paper's two sizes is penalised.
        weight_decay: L2 on the weights (added to the gradient); 5e-4 on resnet9, else 0.
        batch: samples in a step; 512 for images, the bed's own for text.
        trace: whether to print the course.
    Returns:
        row: accuracy (in the bed's unit), billed_bytes, packed_bytes, coded_bytes, weights_kept (0 to 1), seconds
            (of the CPU).
    """
    bed = batched(bed, batch or (512 if bed.unit == "%" else bed.schedule.batch))
    total = steps or bed.schedule.steps
    start = time.process_time()
    decay = (5e-4 if bed.name.startswith("resnet9") else 0.0) if weight_decay is None else weight_decay
    state = Compressed(bed, bed.make(seed).train(), size, decay)
    for step, (x, y) in enumerate(bed.batches(seed, total)):
        for group, rate in zip(state.optimizer.param_groups, state.rates, strict=True):
            group["lr"] = rate * bed.schedule.rate(step, total)
        state.optimizer.zero_grad()
        with parametrize.cached():
            loss = bed.loss(state.model(x), y)
        (loss + gamma * state.average_bits() + L1 * state.bias_penalty()).backward()
        state.optimizer.step()
        state.clamp()
        value = float(loss.detach())
        del loss  # what it holds knows the shapes before the cut
        if (step + 1) % CUT_EVERY == 0:
            state.cut()
        if trace and (step + 1) % max(1, total // 10) == 0:
            print(step + 1, round(value, 4), state.sizes(), file=sys.stderr, flush=True)
    state.cut()
    sizes = state.sizes()
    seconds = time.process_time() - start
    accuracy = bed.accuracy(state.plain())
    return {
        "bed": bed.name,
        "gamma": gamma,
        "size": size,
        "steps": total,
        "batch": bed.schedule.batch,
        "seed": seed,
        "accuracy": round(accuracy, 3),
        **sizes,
        "seconds": round(seconds, 1),
    }


def batched(bed: Bed, batch: int) -> Bed:
    """The bed with other batches and the same number of samples in all."""
    plan = bed.schedule
    return replace(bed, schedule=replace(plan, batch=batch, steps=round(plan.steps * plan.batch / batch)))


def find(
    bed: Bed, *, target_bytes: float | None = None, accuracy: float | None = None, steps: int | None = None,
    seed: int = 0, size: Size = "eq4", tries: int = 5, low: float = 1e-3, high: float = 1.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Search the gamma whose file meets a number of coded bytes, or whose accuracy meets a value, by bisection.

    Args:
        target_bytes: coded bytes that the file may have; the least gamma that meets them is sought.
        accuracy: in the bed's unit, to be kept; the largest gamma that meets it is sought.
        tries: runs that the search may take.
        low: least gamma tried.
        high: largest gamma tried.
    Returns:
        rows: every run, the best one that meets the wish first (none meets it: the order of the runs).
    """
    if (target_bytes is None) == (accuracy is None):
        raise SystemExit("find takes either target_bytes or accuracy.")

    def meets(row: dict[str, Any]) -> bool:
        if target_bytes is not None:
            return row["coded_bytes"] <= target_bytes
        return row["accuracy"] >= accuracy if bed.higher_is_better else row["accuracy"] <= accuracy

    rows = []
    for _ in range(tries):
        gamma = math.sqrt(low * high)
        rows.append(run(bed, gamma, steps, seed, size=size))
        print(rows[-1], file=sys.stderr, flush=True)
        smaller_wanted = meets(rows[-1]) if target_bytes is None else not meets(rows[-1])
        low, high = (gamma, high) if smaller_wanted else (low, gamma)

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        sign = -1 if bed.higher_is_better else 1
        return not meets(row), row["coded_bytes"] if target_bytes is None else sign * row["accuracy"]

    return sorted(rows, key=rank) if any(meets(row) for row in rows) else rows


def rows_of(args: argparse.Namespace, bed: Bed) -> Iterator[dict[str, Any]]:
    for seed in range(args.seeds):
        if args.accuracy is not None or args.bytes is not None:
            yield from find(
                bed, target_bytes=args.bytes, accuracy=args.accuracy, steps=args.steps, seed=seed, size=args.size,
                tries=args.tries,
            )  # fmt: skip
            continue
        for gamma in args.gamma:
            yield run(bed, gamma, args.steps, seed, size=args.size, trace=args.trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=NAMES, required=True)
    parser.add_argument("--gamma", type=float, nargs="*", default=[0.05])
    parser.add_argument("--accuracy", type=float, help="search the largest gamma that keeps it")
    parser.add_argument("--bytes", type=float, help="search the least gamma whose coded file has so many bytes at most")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--size", choices=("eq4", "eq5"), default="eq4")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--cache", type=Path, help="folder that keeps decoded images for the next time")
    parser.add_argument("--tune", action="store_true", help="measure on training samples held out")
    parser.add_argument("--trace", action="store_true", help="print the course")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bed = open_bed(args.bed, args.shared, tune=args.tune, cache=args.cache)
    rows = []
    for row in rows_of(args, bed):
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), file=sys.stderr, flush=True)
    print(json.dumps({"rows": rows, "threads": args.threads}))


if __name__ == "__main__":
    main()
