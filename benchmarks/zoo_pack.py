"""What a zoo's differences take: families exact to the bit and in steps, beside zstd, ZipNN and xor.

    python benchmarks/zoo_pack.py [--shared ../shared/data] [--beds digits,...] [--roots 10] [--out FILE]

Rivals are packages beside the project's own: `pip install --target FOLDER zstandard zipnn`, and FOLDER on PYTHONPATH;
one that is missing is named in `missing`. Beds:

    digits      64-64-32-10 ReLU on scikit-learn's digits, 10 roots x 3 children x 2 grandchildren (100 networks): roots
                30 epochs of 1,200 images, each child 4 epochs of Adam at 1e-3 on 400 of them. As trained; every network
                permuted; every network permuted and rescaled (scales e^N(0,1)).
    carry       the same as digits, in steps of .025 to .035 that keep sums over inputs
    another-task  three children of each root of `digits` that learned to read images a pixel aside, permuted; the
                largest steps, of ours and of direct rounding, that keep the accuracy of each within half a point
    resnet20    the published network, 40 steps of SGD at .01 on 64 images each of the JPEG copy of CIFAR-10; fp32 and
                bf16; as trained, permuted, permuted and rescaled
    char-gpt    4 blocks of 128 on tiny Shakespeare: 150 steps of Adam, then a child of 40 steps at a tenth of the rate;
                fp32 and bf16; as trained, permuted (with signs)

Exact rows: bytes of the tensors over bytes coded (`ratio`) and `bits` a parameter, each child beside its true parent:

    ours                the difference as the zoo stores it, every header, order and factor included; `decode_mb_s` is
                        the best of 3, the checksum included, `align_seconds` of one child;
                        by processor time of one core
    alone               the same coder without a parent
    zstd, zipnn         the child's bytes, zstd at level 19
    xor+zstd            child xor parent, then zstd at 19; "xor+planes+zstd" with bytes sorted by place first

Rows in steps (digits; .01, .02, .04; the parent's decoded state as the reference, as `zoo pack` does it): `bits` a
parameter over the 90 networks that are no roots, all bytes counted; "direct": entropy of the quantised weights;
"difference": entropy of quantised differences to the parent as it stands; both by a histogram of each network that
costs nothing. On 597 test images: mean and worst change of accuracy in points; how often what is decoded answers as
the child did, and how often the bare parent does (`agreement`, `agreement_parent`); and the squared error of the logits
as a share of the parent's (`unlike`: 0 is the child, 1 the parent). Rows of `store` are what a real zoo makes of it
that is told nothing but tensors and the architecture. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from weightfold.data import load
from weightfold.fingerprint import digest
from weightfold.models import build
from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import Symmetries, symmetries
from weightfold.zoo.delta.codec import decode, encode
from weightfold.zoo.delta.layout import bits_of
from weightfold.zoo.delta.matching import match
from weightfold.zoo.delta.steps import Lossy, by_measure, largest_step
from weightfold.zoo.pack import pack
from weightfold.zoo.store import Zoo

State = Mapping[str, Tensor]
STEP = 0.02
CARRIED = (0.025, 0.03, 0.035)
BEDS = ("digits", "carry", "another-task", "resnet20", "char-gpt")
SHIFTS = ((0, 1), (1, 0), (1, 1))
WITHIN = 0.5
STEPS = (0.01, 0.02, 0.04)
REPEATS = 3
SPREADS = {"as trained": None, "permuted": 0.0, "permuted and rescaled": 1.0}


# rivals ---------------------------------------------------------------------------------------------------------------


def rivals() -> tuple[dict[str, Callable[[State, State], int]], list[str]]:
    """Rivals that are installed, and those that are not."""
    found: dict[str, Callable[[State, State], int]] = {}
    missing = []
    try:
        import zstandard

        squeeze = zstandard.ZstdCompressor(level=19)
        found["zstd"] = lambda child, _: len(squeeze.compress(_bytes(child)))
        found["xor+zstd"] = lambda child, parent: len(squeeze.compress(_xor(child, parent)))
        found["xor+planes+zstd"] = lambda child, parent: sum(
            len(squeeze.compress(plane)) for plane in _planes(child, parent)
        )
    except ImportError:
        missing.append("zstandard")
    try:
        import zipnn

        found["zipnn"] = lambda child, _: _zipnn(zipnn, child)
    except ImportError:
        missing.append("zipnn")
    return found, missing


def _bytes(state: State) -> bytes:
    return b"".join(bits_of(value).tobytes() for value in state.values())


def _xor(child: State, parent: State) -> bytes:
    return b"".join((bits_of(child[n]) ^ bits_of(parent[n])).tobytes() for n in child)


def _planes(child: State, parent: State) -> list[bytes]:
    width = max(value.element_size() for value in child.values() if value.is_floating_point())
    same = [n for n in child if child[n].element_size() == width]
    rest = {n: child[n] for n in child if child[n].element_size() != width}
    grid = np.frombuffer(_xor({n: child[n] for n in same}, parent), np.uint8).reshape(-1, width)
    return [*(grid[:, i].tobytes() for i in range(width)), _xor(rest, parent)]


def _zipnn(zipnn: Any, child: State) -> int:
    """ZipNN on the floating tensors end to end, other ones as they are."""
    kinds = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}
    parts: dict[str, list[bytes]] = {}
    for value in child.values():
        parts.setdefault(str(value.dtype), []).append(bits_of(value).tobytes())
    total = 0
    for kind, data in parts.items():
        joined = b"".join(data)
        if kind in kinds:
            joined = bytes(zipnn.ZipNN(bytearray_dtype=kinds[kind], input_format="byte").compress(joined))
        total += len(joined)
    return total


# networks -------------------------------------------------------------------------------------------------------------


def aside(shift: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """Moves images by some rows and columns, around the edge."""
    return lambda images: images.reshape(-1, 8, 8).roll(shift, (1, 2)).reshape(-1, 64)


class Digits:
    """The family of digit networks."""

    def __init__(self, roots: int) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        images, labels = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        self.train, self.test = (images[:1200], labels[:1200]), (images[1200:], labels[1200:])
        self.example = torch.zeros(1, 64)
        self.nets: list[nn.Module] = []
        self.parents: list[int | None] = []
        for seed in range(roots):
            generator = torch.Generator().manual_seed(seed)
            root = self._add(self._trained(self.make(seed), 30, 3e-3, 1200, generator), None)
            for _ in range(3):
                child = self._add(self._trained(self.nets[root], 4, 1e-3, 400, generator), root)
                for _ in range(2):
                    self._add(self._trained(self.nets[child], 4, 1e-3, 400, generator), child)

    def _add(self, net: nn.Module, parent: int | None) -> int:
        self.nets.append(net)
        self.parents.append(parent)
        return len(self.nets) - 1

    @staticmethod
    def make(seed: int = 0) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def _trained(
        self,
        start: nn.Module,
        epochs: int,
        lr: float,
        n: int,
        generator: torch.Generator,
        view: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> nn.Module:
        net = copy.deepcopy(start)
        some = torch.randperm(len(self.train[0]), generator=generator)[:n]
        x, y = view(self.train[0][some]), self.train[1][some]
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in torch.randperm(n, generator=generator).split(64):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(net(x[batch]), y[batch]).backward()
                optimizer.step()
        return net

    @torch.no_grad()
    def logits(self, state: State, view: Callable[[Tensor], Tensor] = lambda images: images) -> Tensor:
        net = self.make()
        net.load_state_dict(dict(state))
        return net(view(self.test[0]))

    def accuracy(self, state: State, view: Callable[[Tensor], Tensor] = lambda images: images) -> float:
        return 100 * float((self.logits(state, view).argmax(1) == self.test[1]).float().mean())

    def moved_on(self, roots: int) -> list[tuple[nn.Module, nn.Module, Callable[[Tensor], Tensor]]]:
        """Roots, and children that learned to read images that lie a pixel aside: (parent, child, what they read)."""
        out = []
        for seed in range(roots):
            root = self.nets[10 * seed]
            for number, shift in enumerate(SHIFTS):
                generator = torch.Generator().manual_seed(100 * seed + number)
                out.append((root, self._trained(root, 15, 1e-3, 1200, generator, aside(shift)), aside(shift)))
        return out

    def states(self, spread: float | None, found: Symmetries) -> list[State]:
        """All networks, each disguised on its own unless the spread is None."""
        nets = self.nets
        if spread is not None:
            seeds = [torch.Generator().manual_seed(i) for i in range(len(nets))]
            pairs = zip(nets, seeds, strict=True)
            nets = [disguise(net, self.example, seed, spread=spread, found=found) for net, seed in pairs]
        return [tensors(net) for net in nets]


def tensors(net: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def stepped(
    net: nn.Module, data: Any, steps: int, optimizer: torch.optim.Optimizer, batch: int, seed: int
) -> nn.Module:
    net.train()
    batches = data.batches("train", batch, generator=torch.Generator().manual_seed(seed))
    for _, (x, y) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        logits = net(x)
        F.cross_entropy(logits.flatten(0, -2), y.flatten().long()).backward()
        optimizer.step()
    return net.eval()


def resnet20(shared: Path) -> tuple[nn.Module, nn.Module, Tensor]:
    """A parent and its child."""
    from safetensors.torch import load_file

    data = load(shared / "cifar10-jpeg-train.parquet", limit=4000)
    parent = build("resnet20", data.task, seed=0)
    parent.load_state_dict(load_file(shared / "cifar10-resnets" / "resnet20.safetensors"))
    child = copy.deepcopy(parent)
    stepped(child, data, 40, torch.optim.SGD(child.parameters(), 0.01, momentum=0.9), 64, 0)
    return parent.eval(), child, torch.zeros(1, 3, 32, 32)


def char_gpt(shared: Path) -> tuple[nn.Module, nn.Module, Tensor]:
    """A parent and its child."""
    data = load(shared / "text" / "tinyshakespeare.txt", context=64)
    parent = build("char-gpt", data.task, seed=0)
    stepped(parent, data, 150, torch.optim.Adam(parent.parameters(), 1e-3), 16, 0)
    child = copy.deepcopy(parent)
    stepped(child, data, 40, torch.optim.Adam(child.parameters(), 1e-4), 16, 1)
    return parent, child, next(iter(data.batches("test", 2)))[0]


# measuring ------------------------------------------------------------------------------------------------------------


def exact_row(pairs: list[tuple[State, State]], found: Symmetries, aligned: bool) -> dict[str, Any]:
    """Every coding of some (child, parent) pairs, with the speed of ours."""
    known, _ = rivals()
    total: dict[str, int] = dict.fromkeys(["ours", "alone", *known], 0)
    seconds = {"align": 0.0, "encode": 0.0, "decode": 0.0}
    n_parameters = n_bytes = 0
    for child, parent in pairs:
        n_parameters += sum(v.numel() for v in child.values())
        n_bytes += len(_bytes(child))
        start = time.process_time()
        moves = match(found, child, parent) if aligned else None
        seconds["align"] += time.process_time() - start
        start = time.process_time()
        data = encode(child, parent, moves=moves)
        seconds["encode"] += time.process_time() - start
        tries = []
        for _ in range(REPEATS):
            start = time.process_time()
            back = decode(data, parent)
            tries.append(time.process_time() - start)
        seconds["decode"] += min(tries)
        if digest(back) != digest(child):
            raise SystemExit("a child did not come back to the bit")
        total["ours"] += len(data)
        total["alone"] += len(encode(child, {}))
        for name, coded in known.items():
            total[name] += coded(child, parent)
    return {
        "parameters": n_parameters,
        "bytes": n_bytes,
        "bits": {name: 8 * size / n_parameters for name, size in total.items()},
        "ratio": {name: n_bytes / size for name, size in total.items()},
        "decode_mb_s": n_bytes / 1e6 / seconds["decode"],
        "encode_mb_s": n_bytes / 1e6 / seconds["encode"],
        "align_seconds": seconds["align"] / len(pairs),
    }


def steps_row(
    digits: Digits, states: list[State], found: Symmetries, aligned: bool, step: float, carry: bool = False
) -> dict[str, Any]:
    """Families in steps: bits of everything but the roots, and what it does to accuracy."""
    decoded: list[State] = []
    n = size = 0
    direct = plain = 0.0
    changes, agreement, agreement_parent, unlike = [], [], [], []
    for state, parent in zip(states, digits.parents, strict=True):
        if parent is None:
            decoded.append(state)
            continue
        base = decoded[parent]
        data = encode(state, base, moves=match(found, state, base) if aligned else None, step=step, carry=carry)
        decoded.append(decode(data, base))
        n += sum(v.numel() for v in state.values())
        size += len(data)
        direct += entropy(torch.cat([v.flatten() for v in state.values()]) / step)
        plain += entropy(torch.cat([(v - base[k]).flatten() for k, v in state.items()]) / step)
        changes.append(digits.accuracy(decoded[-1]) - digits.accuracy(state))
        own, ours, theirs = (digits.logits(s) for s in (state, decoded[-1], states[parent]))
        agreement.append(float((own.argmax(1) == ours.argmax(1)).float().mean()))
        agreement_parent.append(float((own.argmax(1) == theirs.argmax(1)).float().mean()))
        unlike.append(float((own - ours).square().sum() / (own - theirs).square().sum()))
    return {
        "step": step,
        "carry": carry,
        "networks": len(changes),
        "bits": {"ours": 8 * size / n, "direct": direct / n, "difference": plain / n},
        "bytes_a_network": size / len(changes),
        "accuracy_change_mean": float(np.mean(changes)),
        "accuracy_change_worst": min(changes),
        "accuracy_change_deviation": float(np.std(changes)),
        "agreement": float(np.mean(agreement)),
        "agreement_parent": float(np.mean(agreement_parent)),
        "unlike": float(np.mean(unlike)),
    }


def bound_row(digits: Digits, found: Symmetries, roots: int) -> dict[str, Any]:
    """Children of another task than their parents': the largest steps that keep the accuracy of each."""
    sizes, direct, accuracies, losses = [], [], [], []
    for number, (root, net, view) in enumerate(digits.moved_on(roots)):
        parent = tensors(root)
        child = tensors(disguise(net, digits.example, torch.Generator().manual_seed(number), spread=0.0, found=found))
        change = by_measure(lambda state, view=view: digits.accuracy(state, view))
        moves = match(found, child, parent)
        step = largest_step(child, parent, moves, Lossy(change=change, within=WITHIN))
        data = encode(child, parent, moves=moves, step=step)
        sizes.append(8 * len(data) / sum(v.numel() for v in child.values()))
        losses.append(digits.accuracy(decode(data, parent), view) - digits.accuracy(child, view))
        accuracies.append((digits.accuracy(parent, view), digits.accuracy(child, view)))
        direct.append(_direct_bits(child, change))
    return {
        "net": "digits, another task",
        "networks": len(sizes),
        "within": WITHIN,
        "bits": {"ours": float(np.mean(sizes)), "direct": float(np.mean(direct))},
        "accuracy_parent": float(np.mean([a for a, _ in accuracies])),
        "accuracy_child": float(np.mean([b for _, b in accuracies])),
        "accuracy_change_mean": float(np.mean(losses)),
        "accuracy_change_worst": min(losses),
    }


def _direct_bits(child: State, change: Callable[[State, State], float]) -> float:
    """Entropy of weights rounded to the largest of many steps that keeps the bound."""
    for power in np.arange(0.0, -8.0, -0.125):
        step = float(2**power)
        if change(child, {n: (v / step).round() * step for n, v in child.items()}) <= WITHIN:
            flat = torch.cat([v.flatten() for v in child.values()])
            return entropy(flat / step) / flat.numel()
    return 32.0


def entropy(values: Tensor) -> float:
    """Bits of numbers rounded to whole ones, by their own histogram."""
    count = torch.unique(values.round(), return_counts=True)[1].double()
    return float(-(count * (count / count.sum()).log2()).sum())


def store_row(digits: Digits, states: list[State], lossy: bool) -> dict[str, Any]:
    """A zoo that is told nothing but tensors and the architecture."""
    with tempfile.TemporaryDirectory() as folder, Zoo.open(Path(folder, "zoo")) as zoo:
        names = [f"net{i:03d}" for i in range(len(states))]
        zoo.add_many(states, names=names, model=Digits.make(), example=digits.example)
        start = time.perf_counter()
        done = pack(zoo, lossy=Lossy(step=STEP) if lossy else None)
        seconds = time.perf_counter() - start
        problems = len(zoo.verify())
        back = [zoo.state(name) for name in names]
    packed = [row for row in done.rows if row.parent is not None]
    pairs = zip(states, back, strict=True)
    changes = [digits.accuracy(b) - digits.accuracy(a) for a, b in pairs]
    per = sum(v.numel() for v in states[0].values())
    return {
        "networks": len(states),
        "packed": len(packed),
        "bits_packed": 8 * sum(row.after for row in packed) / (per * max(1, len(packed))),
        "bits_all": 8 * done.after / (per * len(states)),
        "bytes_before": done.before,
        "bytes_after": done.after,
        "exact": all(digest(a) == digest(b) for a, b in zip(states, back, strict=True)),
        "accuracy_change_mean": float(np.mean(changes)),
        "accuracy_change_worst": min(changes),
        "problems": problems,
        "seconds": seconds,
    }


def rows(shared: Path, *, beds: tuple[str, ...] = BEDS, roots: int = 10) -> dict[str, Any]:
    """Everything; what `benchmarks/zoo.py` puts into its own result.

    Returns:
        "exact", "steps" and "store": lists of rows; "bits_per_parameter": of the networks that a zoo packed in steps of
        .02, by disguise; "missing": rivals that are not installed.
    """
    out: dict[str, Any] = {"exact": [], "steps": [], "store": [], "missing": rivals()[1]}
    if "digits" in beds:
        digits = Digits(roots)
        found = symmetries(Digits.make(), digits.example)
        for disguised, spread in SPREADS.items():
            states = digits.states(spread, found)
            what, aligned = {"net": "digits", "disguise": disguised}, spread is not None
            pairs = [(s, states[p]) for s, p in zip(states, digits.parents, strict=True) if p is not None]
            _note(out["exact"], {**what, "dtype": "float32", **exact_row(pairs, found, aligned)})
            for step in STEPS:
                _note(out["steps"], {**what, **steps_row(digits, states, found, aligned, step)})
            for lossy in (False, True):
                _note(out["store"], {**what, "lossy": lossy, **store_row(digits, states, lossy)})
        out["bits_per_parameter"] = {row["disguise"]: row["bits_packed"] for row in out["store"] if row["lossy"]}
    if "carry" in beds:
        digits = Digits(roots)
        found = symmetries(Digits.make(), digits.example)
        for disguised, spread in SPREADS.items():
            states = digits.states(spread, found)
            for step in CARRIED:
                row = steps_row(digits, states, found, spread is not None, step, carry=True)
                _note(out["steps"], {"net": "digits", "disguise": disguised, **row})
    if "another-task" in beds:
        digits = Digits(roots)
        _note(out["steps"], bound_row(digits, symmetries(Digits.make(), digits.example), roots))
    for name, made in (("resnet20", resnet20), ("char-gpt", char_gpt)):
        if name in beds:
            out["exact"] += large_rows(name, *made(shared))
    return out


def large_rows(name: str, parent: nn.Module, child: nn.Module, example: Tensor) -> list[dict[str, Any]]:
    """Exact differences of one child, in fp32 and bf16, disguised and not."""
    found, out = symmetries(parent, example), []
    for disguised, spread in SPREADS.items():
        if name == "char-gpt" and spread:
            continue  # its heads would be mixed too, which no order or factor undoes
        generator = torch.Generator().manual_seed(0)
        net = child if spread is None else disguise(child, example, generator, spread=spread, found=found)
        for dtype in (torch.float32, torch.bfloat16):
            one, two = (_cast(tensors(n), dtype) for n in (net, parent))
            what = {"net": name, "disguise": disguised, "dtype": str(dtype).removeprefix("torch.")}
            _note(out, {**what, **exact_row([(one, two)], found, spread is not None)})
    return out


def _cast(state: State, dtype: torch.dtype) -> State:
    return {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()}


def _note(into: list[dict[str, Any]], row: dict[str, Any]) -> None:
    into.append(row)
    print(json.dumps(row), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--beds", default=",".join(BEDS))
    parser.add_argument("--roots", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "load": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")},
        **rows(args.shared, beds=tuple(args.beds.split(",")), roots=args.roots),
    }
    for name in ("zstandard", "zipnn"):
        if name not in facts["missing"]:
            facts["versions"][name] = importlib.metadata.version(name)
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
