"""Random networks, traced, proved, and every admitted edit checked.

    python benchmarks/graph_fuzz.py --nets 1000 --seed 0 [--workers 2] [--only I] [--without-proof] [--recipe TEXT]

Each network is put together from the pieces of `fuzz_pieces.py` and `fuzz_layers.py` by a seed of its own, so that
net I of seed S is always the same. It is traced and its sizes are tried (`trace`, `with_sizes`); then every edit that
every group admits is applied to a float64 copy, and all outputs are compared, in evaluation and in training mode
(`fuzz_check.py`). An edit is wrong where they differ by more than 1e-9 of their magnitude, or where anything is raised.

`wrong` are the edits that were admitted after the proof on the model, `wrong_without_proof` those that the rules alone
would have let through, `withdrawn_by_proof` the admissions that the proof took back. A network that cannot be traced is
told with a remedy; any other exception is a raw error. A failing network is shrunk, piece by piece, and printed as a
recipe, which `--recipe` runs again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz_check import Finding, Subject, check, told
from fuzz_net import Built, Recipe, build, draw, smaller

import weightfold
from weightfold.errors import WeightfoldError
from weightfold.graph.proof import prepared
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace

TIME_LIMIT_S = 120
MOST_SHRINKS = 60


@dataclass
class Report:
    """What came of one network."""

    recipe: str
    invalid: str = ""
    untraced: str = ""
    raw: str = ""
    groups: int = 0
    free: int = 0
    checks: Counter[str] = field(default_factory=Counter)
    wrong: list[Finding] = field(default_factory=list)
    let_through: list[Finding] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)
    operators: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    seconds: float = 0.0
    shrunk: str = ""

    @property
    def failure(self) -> str:
        """Of what kind the failure is, or ""."""
        if self.invalid or self.raw:
            return f"invalid {self.invalid}"[:40] if self.invalid else f"raw {self.raw.split(':')[0]}"
        first = (self.wrong or self.let_through or [None])[0]
        return "" if first is None else f"{first.kind}{' ' + first.raised.split(':')[0] if first.raised else ''}"


def seed_of(seed: int, number: int) -> int:
    """The seed of one network."""
    return seed * 1_000_003 + number


def study(recipe: Recipe, *, prove: bool, kinds: Collection[str] = ()) -> Report:
    """Trace one network, prove its graph, try every edit that is admitted (of some kinds only)."""
    report = Report(recipe.text(), pieces=tuple(sorted(recipe.names())))
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with within(TIME_LIMIT_S):
                _study(recipe, report, prove, kinds)
        except WeightfoldError as error:
            report.untraced = error.message[:300]
            if not error.remedy:
                report.raw = f"no remedy with {told(error)}"
        except Exception as error:
            report.raw = f"{told(error)} at {_place(error)}"
    report.seconds = time.process_time() - started
    return report


def _study(recipe: Recipe, report: Report, prove: bool, kinds: Collection[str]) -> None:
    built = build(recipe)
    try:
        Subject(*_parts(build(recipe))).outputs()
        if recipe.used:
            built.net(*built.args, **built.kwargs)
    except Exception as error:
        report.invalid = told(error)
        return
    example = (built.args, built.kwargs)
    traced = trace(built.net, example)
    graph = prepared(built.net, example, graph=traced) if prove else with_sizes(built.net, example, traced)
    report.withdrawn = [f"{kind} of {name}" for name, kind, _ in graph.proved.withdrawn]
    report.groups, report.free = len(graph), sum(group.free for group in graph)
    report.operators = tuple(sorted(set(graph.operators)))
    fresh = lambda: Subject(*_parts(build(recipe)))  # noqa: E731
    report.wrong = [finding for finding in _counted(report, check(fresh, graph, recipe.seed, kinds)) if finding.wrong]
    report.let_through = report.wrong
    if report.withdrawn:
        graph = with_sizes(built.net, example, traced)
        report.let_through = [f for f in check(fresh, graph, recipe.seed, kinds) if f.wrong]
    for finding in (*report.wrong, *report.let_through):
        if finding.mode == "apply" and finding.raised.startswith("raw"):
            report.raw = report.raw or f"{finding.kind} {finding.mode}: {finding.raised}"


def _counted(report: Report, findings: Iterable[Finding]) -> Iterator[Finding]:
    for finding in findings:
        report.checks[finding.kind] += 1
        yield finding


def _parts(built: Built) -> tuple[Any, ...]:
    return built.net, built.args, built.kwargs


def _place(error: BaseException) -> str:
    frame, place = error.__traceback__, ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if "weightfold" in file:
            place = f"{Path(file).name}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` where the work takes longer."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """Drop pieces as long as the failure stays."""
    tries, found = 0, True
    while found:
        found = False
        for candidate in smaller(recipe):
            tries += 1
            if tries > MOST_SHRINKS:
                return recipe
            if fails(candidate):
                recipe, found = candidate, True
                break
    return recipe


def run_one(work: tuple[int, bool]) -> Report:
    """Study one network."""
    seed, prove = work
    torch.set_num_threads(1)
    return study(draw(seed), prove=prove)


def shrunk(report: Report, *, prove: bool) -> str:
    """The smallest recipe found that fails as a network did."""
    kind = report.failure
    kinds = () if report.invalid or report.raw else {kind.split()[0]}
    fails = lambda r: study(r, prove=prove, kinds=kinds).failure == kind  # noqa: E731
    return shrink(Recipe.read(report.recipe), fails).text()


def told_of(number: int, report: Report) -> list[str]:
    """Lines on a network that failed, or could not be traced."""
    out = []
    if report.invalid:
        out.append(f"net {number}: does not run: {report.invalid}")
    if report.untraced:
        out.append(f"net {number}: not traced: {report.untraced[:200]}")
    if report.raw:
        out.append(f"net {number}: RAW {report.raw}")
    wrong = {(f.group, f.kind) for f in report.wrong}
    rest = [f for f in report.let_through if (f.group, f.kind) not in wrong]
    for mark, findings in (("WRONG", report.wrong), ("by rules alone", rest)):
        for finding in findings[:4]:
            what = finding.raised or f"{finding.error:.2g}"
            out.append(f"net {number}: {mark}: {finding.kind} of '{finding.group}' ({finding.mode}): {what}")
    if report.shrunk:
        out.append(f"    {report.shrunk}")
    return out


def summary(reports: list[Report], seconds: float, *, prove: bool) -> dict[str, Any]:
    """The figures of the last line."""
    valid = [r for r in reports if not r.invalid]
    traced = [r for r in valid if not r.untraced and not r.raw]
    pieces = Counter(name for r in valid for name in r.pieces)
    operators = {name for r in valid for name in r.operators}
    kinds = lambda name: dict(sorted(Counter(f.kind for r in reports for f in getattr(r, name)).items()))  # noqa: E731
    return {
        "nets": len(reports),
        "traced": len(traced),
        "checks": sum(sum(r.checks.values()) for r in reports),
        "wrong": sum(len(r.wrong) for r in reports),
        "wrong_without_proof": sum(len(r.let_through) for r in reports),
        "withdrawn_by_proof": sum(len(r.withdrawn) for r in reports),
        "raw_errors": sum(bool(r.raw) for r in reports),
        "invalid": len(reports) - len(valid),
        "nets_wrong": sum(bool(r.wrong) for r in reports),
        "nets_wrong_without_proof": sum(bool(r.let_through) for r in reports),
        "proved": prove,
        "groups": sum(r.groups for r in reports),
        "free_groups": sum(r.free for r in reports),
        "nets_with_free_groups": sum(r.free > 0 for r in reports),
        "checks_by_kind": dict(sorted(sum((r.checks for r in reports), Counter()).items())),
        "wrong_by_kind": kinds("wrong"),
        "wrong_without_proof_by_kind": kinds("let_through"),
        "pieces": len(pieces),
        "operators": len(operators),
        "seconds": round(seconds, 1),
        "core_seconds_per_net": round(sum(r.seconds for r in reports) / max(len(reports), 1), 3),
        "slowest_s": round(max((r.seconds for r in reports), default=0.0), 2),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "weightfold": weightfold.__version__
        },
    }  # fmt: skip


def every(work: list[tuple[int, bool]], workers: int) -> Iterator[Report]:
    """Reports in order."""
    if workers < 2:
        yield from map(run_one, work)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=400) as pool:
        yield from pool.map(run_one, work, chunksize=4)


def show(recipe: Recipe, *, prove: bool) -> Report:
    """Print everything about one network."""
    print(recipe.text())
    print(build(recipe).net)
    report = study(recipe, prove=prove)
    for line in told_of(0, report):
        print(line)
    return report


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", type=int, help="one network of the seed, told at length")
    parser.add_argument("--recipe", help="a recipe as printed, told at length")
    parser.add_argument("--without-proof", action="store_true", help="what the rules alone admit")
    parser.add_argument("--shrink", type=int, default=3, help="networks to shrink for each kind of failure")
    options = parser.parse_args()
    prove, started = not options.without_proof, time.perf_counter()
    if options.recipe or options.only is not None:
        recipe = Recipe.read(options.recipe) if options.recipe else draw(seed_of(options.seed, options.only))
        reports = [show(recipe, prove=prove)]
    else:
        work = [(seed_of(options.seed, k), prove) for k in range(options.nets)]
        reports, failures = [], Counter()
        for number, report in enumerate(every(work, options.workers)):
            reports.append(report)
            failures[report.failure] += 1
            if report.failure and failures[report.failure] <= options.shrink:
                report.shrunk = shrunk(report, prove=prove)
            for line in told_of(number, report):
                print(line, flush=True)
    print(json.dumps(summary(reports, time.perf_counter() - started, prove=prove)))


if __name__ == "__main__":
    main()
