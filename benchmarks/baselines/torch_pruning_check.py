"""Whether Torch-Pruning's dependency graph removes channels exactly, for one architecture or for many.

One group is checked like this, in float64: zeros are planted in every slice the group says it removes, the outputs are
recorded, the group is pruned, and the outputs must be equal to a relative error of 1e-9. A norm over channels
(LayerNorm, RMSNorm, GroupNorm) divides by the number of channels, so in the recorded run it sees only those that stay.

The graph is used as it comes, with the help that the library's own pruner gives or asks for. Where a member has groups
of channels (grouped convolution, GroupNorm), one channel of every group is removed. Where that is not exact, one
channel of every attention head and a whole head are tried, with the numbers of heads of the model's configuration; the
group is right if any of these is. Attributes of the model (number of heads, ...) are not edited afterwards. Left out of
the count are groups that reach an output, by the library's graph or by the shapes, and groups the library refuses.

    python benchmarks/baselines/torch_pruning_check.py NAME        # one JSON line
    python benchmarks/baselines/torch_pruning_check.py --all FILE  # every architecture, each in its own process
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from architectures import Architecture, KeepDouble, architectures, by_name, to_double

TOLERANCE = 1e-9
MAX_CHECKED = 6
LISTING_S = 30.0
RESERVE_S = 5.0


@dataclass
class Outcome:
    """What came of one architecture.

    ``listed`` says that the enumeration of all groups ended in time. ``right`` includes ``right_by_heads``;
    ``at_output`` and ``refused`` count the groups left out.
    """

    name: str
    built: bool = False
    listed: bool = False
    groups: int = 0
    checked: int = 0
    right: int = 0
    wrong: int = 0
    failed: int = 0
    at_output: int = 0
    refused: int = 0
    right_by_heads: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def exact(self) -> bool:
        """Tell whether every group that was checked (at least one) was right."""
        return self.checked > 0 and self.wrong == self.failed == 0

    @property
    def ok(self) -> bool:
        """Tell whether the graph was built, all its groups could be listed, and those checked were right."""
        return self.built and self.listed and self.exact

    def row(self) -> dict[str, Any]:
        """Give all fields and the two verdicts."""
        return {**asdict(self), "exact": self.exact, "ok": self.ok}


class OutOfTime(BaseException):
    """The time of this process is up; not an Exception, so that no handler takes it for a failure of a group."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after that many seconds; a limit around it goes on counting."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    previous, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
    outer_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        left_s = max(outer_s - (time.monotonic() - start), 1e-3) if outer_s else 0.0
        signal.setitimer(signal.ITIMER_REAL, left_s)
        signal.signal(signal.SIGALRM, previous)


# Graph and groups


class Case:
    """A freshly built model with its inputs and its dependency graph."""

    def __init__(self, architecture: Architecture) -> None:
        import torch_pruning

        self.model, self.args, self.kwargs = to_double(architecture.build())
        self.graph = torch_pruning.DependencyGraph()
        self.graph.build_dependency(
            self.model,
            example_inputs=(self.args, self.kwargs),
            forward_fn=lambda model, inputs: model(*inputs[0], **inputs[1]),
            output_transform=lambda out: [t for t in tensors(out) if t.grad_fn is not None],
            verbose=False,
        )

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """Compute all output tensors."""
        return [t.clone() for t in tensors(self.model(*self.args, **self.kwargs))]

    def roots(self) -> Iterator[str]:
        """List one root layer (convolution, linear, LSTM, attention) per group of two or more channels."""
        kinds = [nn.modules.conv._ConvNd, nn.Linear, nn.LSTM, nn.MultiheadAttention]
        for group in self.graph.get_all_groups(root_module_types=kinds):
            layer = group[0].dep.target.module
            if self.graph.get_out_channels(layer) > 1:
                yield self.graph._module2name[layer]

    def group(self, root: str, idxs: list[int]) -> Any:
        """Give the group that removes those output channels of the layer of that name."""
        module = self.model.get_submodule(root)
        return self.graph.get_pruning_group(module, self.graph.get_pruner_of_module(module).prune_out_channels, idxs)

    def choices(self, root: str) -> list[list[int]]:
        """List the removals to try: one channel per channel group, then one per head, then one whole head."""
        n = self.graph.get_out_channels(self.model.get_submodule(root))
        n_groups = max(self.channel_groups(dep) for dep, _ in self.group(root, list(range(n))))
        heads = [h for h in self.heads() if n % h == 0 and h < n]
        per_head = [one_per_part(n, h) for h in heads if h != n_groups]
        return [one_per_part(n, n_groups), *per_head, *(list(range(n // h)) for h in heads)]

    def heads(self) -> list[int]:
        """List the numbers of attention heads that the model's configuration or attention modules name."""
        names = ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head")
        attentions = [m for m in self.model.modules() if isinstance(m, nn.MultiheadAttention)]
        sources = [*attentions, *(getattr(m, "config", None) for m in self.model.modules())]
        found = tree_leaves([getattr(source, name, None) for source in sources for name in names])
        return sorted({h for h in found if isinstance(h, int) and h > 1}, reverse=True)

    def channel_groups(self, dep: Any) -> int:
        """Count the groups of channels on the side of a layer that a dependency removes from."""
        module = dep.target.module
        depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels
        pruner = self.graph.get_pruner_of_module(module)
        if depthwise or pruner is None or not isinstance(module, nn.Module):
            return 1
        outwards = self.graph.is_out_channel_pruning_fn(dep.handler)
        return pruner.get_out_channel_groups(module) if outwards else pruner.get_in_channel_groups(module)


def one_per_part(n: int, n_parts: int) -> list[int]:
    """Choose one channel in each of ``n_parts`` equal parts, at the same place in each."""
    width = n // n_parts
    return [width // 3 + i * width for i in range(n_parts)]


def tensors(out: Any) -> list[Tensor]:
    """List the floating tensors of any nested output."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


# Zeros where a group removes


def numbered(tensor: Tensor) -> Tensor:
    """Give a tensor of the same shape that holds each element's position."""
    return torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)


def removed(before: Tensor, after: Tensor) -> Tensor:
    """Mark the elements of ``before`` (numbered) that a pruning function left out of ``after``."""
    return ~torch.isin(before, after)


def state(module: nn.Module) -> dict[str, Tensor]:
    """Collect a module's own floating parameters and buffers."""
    own = (*module.named_parameters(recurse=True), *module.named_buffers(recurse=True))
    return {name: tensor for name, tensor in own if tensor.is_floating_point()}


def masks_of(dep: Any, idxs: list[int]) -> list[tuple[str, Tensor, Tensor]]:
    """List (name, tensor, mask of removed elements), by letting the library prune a copy filled with positions."""
    target = dep.target.module
    dep.handler.__self__.pruning_dim = dep.target.pruning_dim
    if isinstance(target, nn.Parameter):
        mask = removed(numbered(target), dep.handler(nn.Parameter(numbered(target)), list(idxs)))
        return [("", target, mask)]
    if not state(target):
        return []
    twin = copy.deepcopy(target)
    for tensor in state(twin).values():
        tensor.data.copy_(numbered(tensor))
    positions = {name: tensor.detach().clone() for name, tensor in state(twin).items()}
    dep.handler(twin, list(idxs))
    after = state(twin)
    return [(name, tensor, removed(positions[name], after[name])) for name, tensor in state(target).items()]


@torch.no_grad()
def plant_zeros_(case: Case, group: Any) -> None:
    """Zero every element the group removes, and let norms over channels see only the channels that stay."""
    marked = [entry for dep, idxs in group for entry in masks_of(dep, idxs)]
    lost = {id(tensor): mask for _, tensor, mask in marked if mask.any()}
    for module in case.model.modules():
        weight = getattr(module, "weight", None)
        if is_channel_norm(module) and weight is None:
            module.forward = partial(forward_nonzero, module, module.forward)
        elif is_channel_norm(module) and id(weight) in lost:
            module.forward = narrow_forward(module, ~lost[id(weight)].flatten(), channel_axis(module))
        elif "WeightStandardized" in type(module).__name__ and id(weight) in lost:
            module.forward = narrow_forward(module, ~lost[id(weight)].transpose(0, 1).flatten(1).all(1), 1)
    for _, tensor, mask in marked:
        tensor[mask] = 0.0


def is_channel_norm(module: nn.Module) -> bool:
    """Tell whether a module divides by a statistic taken over channels."""
    kind = type(module).__name__
    named = ("Norm" in kind or kind.endswith("GRN")) and not any(module.children())
    known = isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))
    return known or (named and not isinstance(module, nn.modules.batchnorm._NormBase))


def channel_axis(norm: nn.Module) -> int:
    """Give the axis of a norm's input that holds the channels."""
    first = isinstance(norm, nn.GroupNorm) or getattr(norm, "data_format", "") == "channels_first"
    return 1 if first else -1


def narrowed(module: nn.Module, keep: Tensor) -> nn.Module:
    """Copy a module so that it works on the kept channels of its input only."""
    small, n, n_kept = copy.deepcopy(module), keep.numel(), int(keep.sum())
    small.__dict__.pop("forward", None)
    for name, parameter in list(small.named_parameters(recurse=False)):
        at = 1 if isinstance(module, nn.modules.conv._ConvNd) else parameter.ndim - 1
        if at < parameter.ndim and parameter.shape[at] == n:
            setattr(small, name, nn.Parameter(parameter.index_select(at, keep.nonzero().flatten())))
    for name, value in (("normalized_shape", (n_kept,)), ("num_channels", n_kept), ("in_channels", n_kept)):
        if hasattr(small, name):
            setattr(small, name, value)
    return small


def narrow_forward(module: nn.Module, keep: Tensor, axis: int) -> Callable:
    """Build a forward in which only the kept channels of the input exist; a norm gives zero for the others."""
    small = narrowed(module, keep)
    if isinstance(module, nn.modules.conv._ConvNd):
        return lambda x: small(x.index_select(axis, keep.nonzero().flatten()))
    return partial(forward_kept, small.forward, keep.nonzero().flatten(), axis)


def forward_nonzero(norm: nn.Module, forward: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply a norm without weights to the channels that are not zero everywhere."""
    axis = channel_axis(norm)
    keep = x.movedim(axis, 0).flatten(1).ne(0).any(1)
    if keep.all() or not keep.any():
        return forward(x, *args, **kwargs)
    return forward_kept(narrowed(norm, keep).forward, keep.nonzero().flatten(), axis, x, *args, **kwargs)


def forward_kept(forward: Callable, keep_idx: Tensor, axis: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply ``forward`` to the kept channels of ``x``; the others are zero in the result."""
    y = forward(x.index_select(axis, keep_idx), *args, **kwargs)
    return torch.zeros(x.shape, dtype=y.dtype).index_copy(axis, keep_idx, y)


# Checks


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """Give the largest difference of two lists of outputs of equal shapes, relative to the largest expected value."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs)


def try_removal(case: Case, root: str, idxs: list[int]) -> str:
    """Prune channels of one group of a fresh model: "right", "wrong: error", "at_output" or "refused"."""
    shapes = [t.shape for t in case.run()]
    group = case.group(root, idxs)
    if any(dep.target.type == case.graph.ops.OPTYPE.OUTPUT for dep, _ in group):
        return "at_output"
    if not case.graph.check_pruning_group(group):
        return "refused"
    plant_zeros_(case, group)
    expected = case.run()
    for module in case.model.modules():
        module.__dict__.pop("forward", None)
    group.prune()
    got = case.run()
    if [t.shape for t in got] != shapes:
        return "at_output"
    error = relative_error(got, expected)
    return "right" if error <= TOLERANCE else f"wrong: {error:.1e}"


def attempt(architecture: Architecture, root: str, i_choice: int) -> str:
    """Try one removal on a fresh model; what it raises is "failed: ..."."""
    try:
        case = Case(architecture)
        return try_removal(case, root, case.choices(root)[i_choice])
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}".split("\n")[0][:200]


def check_group(architecture: Architecture, root: str) -> str:
    """Check one group: the first removal's result, or "right_by_heads" where only a later one is exact."""
    first = attempt(architecture, root, 0)
    if first in ("right", "at_output", "refused"):
        return first
    try:
        n_choices = len(Case(architecture).choices(root))
    except Exception:
        return first
    exact = any(attempt(architecture, root, i) == "right" for i in range(1, n_choices))
    return "right_by_heads" if exact else first


def spread(items: list[str]) -> list[str]:
    """Reorder so that every beginning of the list is spread over the whole: first, last, middle, quarters, ..."""
    if len(items) < 3:
        return items
    steps = [round(i * (len(items) - 1) / k) for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) for i in range(k + 1)]
    return [items[i] for i in dict.fromkeys((*steps, *range(len(items))))]


def record(outcome: Outcome, root: str, result: str) -> None:
    """Count one result and keep the first message of a wrong or failed group."""
    kind = result.split(":")[0]
    setattr(outcome, kind, getattr(outcome, kind) + 1)
    outcome.checked += kind not in ("at_output", "refused")
    outcome.right += kind == "right_by_heads"
    if kind in ("wrong", "failed") and outcome.wrong + outcome.failed == 1:
        outcome.error = "; ".join(filter(None, (outcome.error, f"{root}: {result}")))


def list_roots(outcome: Outcome, architecture: Architecture) -> list[str]:
    """Build the graph and list its groups; where listing fails or does not end, give those listed so far."""
    case, roots = Case(architecture), []
    outcome.built = True
    try:
        with time_limit(LISTING_S):
            for root in case.roots():
                roots.append(root)
        outcome.listed = True
    except OutOfTime:
        outcome.error = f"groups not listed after {LISTING_S:.0f} s"
    except Exception as error:
        outcome.error = f"listing groups: {type(error).__name__}: {error}".split("\n")[0][:200]
    outcome.groups = len(roots)
    return roots


def run_checks(outcome: Outcome, n_groups: int) -> None:
    """Build the graph, then check groups until ``n_groups`` have been checked, in place."""
    architecture = by_name(outcome.name)
    for root in spread(list_roots(outcome, architecture)):
        record(outcome, root, check_group(architecture, root))
        if outcome.checked >= n_groups:
            return


def check(name: str, n_groups: int = MAX_CHECKED, seconds: float = 60.0) -> Outcome:
    """Check one architecture in this process; what was counted before the time was up is kept."""
    outcome, start = Outcome(name), time.perf_counter()
    try:
        with time_limit(seconds), KeepDouble():
            run_checks(outcome, n_groups)
    except OutOfTime:
        outcome.error = outcome.error or "time is up"
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    outcome.seconds = round(time.perf_counter() - start, 2)
    return outcome


def check_in_process(name: str, timeout: float) -> dict[str, Any]:
    """Check one architecture in a process of its own, which is killed after ``timeout`` seconds."""
    command = [sys.executable, str(Path(__file__).resolve()), name, "--seconds", str(timeout - RESERVE_S)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        error = f"killed after {timeout:.0f} s"
    except (IndexError, ValueError):
        error = f"process ended with {done.returncode}: {done.stderr.strip()[-200:]}"
    outcome = Outcome(name, seconds=round(time.perf_counter() - start, 2), error=error)
    return outcome.row()


def check_all(names: list[str], timeout: float = 60.0, workers: int = 3) -> dict[str, dict[str, Any]]:
    """Check many architectures, each in its own process, ``workers`` at a time; the result is in the order of names."""
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(partial(check_in_process, timeout=timeout), names), strict=True))


def versions() -> dict[str, str]:
    """Give the versions a result depends on."""
    packages = ("torch", "transformers", "torch-pruning")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def totals(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Sum up architectures and groups."""
    rows = list(results.values())
    counts = ("groups", "checked", "right", "right_by_heads", "wrong", "failed", "at_output", "refused")
    sums = {key: sum(r[key] for r in rows) for key in counts}
    verdicts = {key: sum(r[key] for r in rows) for key in ("built", "listed", "exact", "ok")}
    return {"architectures": len(rows), **verdicts, **sums}


def write_all(path: Path, timeout: float, workers: int) -> None:
    """Check every architecture and write results, totals and versions to a file."""
    results = check_all([a.name for a in architectures()], timeout, workers)
    kept = {
        "date": date.today().isoformat(),
        "versions": versions(),
        "settings": {
            "timeout_s": timeout,
            "listing_s": LISTING_S,
            "max_checked": MAX_CHECKED,
            "tolerance": TOLERANCE,
            "threads": 1,
        },
        "totals": totals(results),
        "results": list(results.values()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept["totals"]))


def main() -> None:
    """Check one architecture and print one JSON line, or check all and write a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("--all", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--groups", type=int, default=MAX_CHECKED)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    if options.all:
        write_all(options.all, options.seconds, options.workers)
    elif options.name:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        outcome = check(options.name, options.groups, options.seconds)
        print(json.dumps(outcome.row()))
    else:
        parser.error("name an architecture, or give --all FILE")


if __name__ == "__main__":
    main()
