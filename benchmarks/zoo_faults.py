"""Kill -9 while a zoo is written: no acknowledged model may be lost, none may be wrong.

    python benchmarks/zoo_faults.py [--kills 500] [--seed 0] [--out FILE]

Every kill hits a process of its own, forked from one that has imported everything. Half of them add models, one by one
and several in a transaction, first those that a killed process had begun, remove some, and sweep; the other half packs
models into differences, without loss, and unpacks some again. Some are killed after a random time (half of those that
add, a third of those that pack), the others at a random call of the operating system or of SQLite, before it or after.
What the process acknowledged through a pipe before it died is compared with what a fresh reader finds: every name, the
SHA-256 of every model's tensors, every blob, the catalogue; in every fifth zoo after a sweep as well. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightfold import __version__
from weightfold.errors import WeightfoldError
from weightfold.fingerprint import digest
from weightfold.zoo.exchange.describe import Tracer
from weightfold.zoo.pack import pack
from weightfold.zoo.store import Zoo

N_A_ZOO = 12
"""Kills before a new zoo is begun."""
LONGEST_S = {"add": 0.5, "pack": 2.0}
MOST_CALLS = 400
N_FAMILIES = 8
N_PACKED = 4
"""Models that are packed at a time."""
CALLS = frozenset({"open", "write", "fsync", "replace", "rename", "unlink", "flock", "close", "execute", "mkdir"})
EXAMPLE = torch.zeros(1, 16)
State = dict[str, Tensor]


@dataclass
class Known:
    """What must and what may be in a zoo: digests by name; names whose removal was begun."""

    sure: dict[str, str] = field(default_factory=dict)
    tried: dict[str, str] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)


def main(kills: int, seed: int, out: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    start, chance, tracer = time.perf_counter(), random.Random(seed), Tracer()
    totals: Counter[str] = Counter(
        dict.fromkeys(("kills", "lost", "wrong", "problems", "acknowledged", "checked", "differences", "left_over"), 0)
    )
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(Path(scratch, "warm"), tracer)
        for at in range(kills):
            if at % N_A_ZOO == 0:
                folder, known = Path(scratch, str(at)), Known()
            kind = "pack" if at % 2 else "add"
            by_time = chance.random() < 0.5 if kind == "add" else chance.random() < 0.3
            kill_one(folder, kind, by_time, tracer, known, chance.getrandbits(32), totals)
            check(folder, known, totals, sweep=at // N_A_ZOO % 5 == 4)
            totals["kills"] += 1
            if at % 25 == 24:
                print(f"{at + 1} kills, {dict(totals)}", file=sys.stderr, flush=True)
    report = {
        **totals,
        "seconds": round(time.perf_counter() - start, 1),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "n_cores": os.cpu_count(),
        "versions": {
            "weightfold": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "sqlite": sqlite3.sqlite_version,
        },
    }
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))
    return report


def warm_up(folder: Path, tracer: Tracer) -> None:
    """Trace the architecture, pack and read once, so that children find everything imported."""
    with Zoo.open(folder, tracer=tracer) as zoo:
        for name, state in family(0, 3):
            zoo.add(state, name=name, model=net(), example=EXAMPLE)
        pack(zoo)
        zoo.verify()


def kill_one(
    folder: Path, kind: str, by_time: bool, tracer: Tracer, known: Known, seed: int, totals: Counter[str]
) -> None:
    """Let a process work on the zoo, kill it, and take down what it acknowledged."""
    chance = random.Random(seed)
    read, write = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            if not by_time:
                die_at_call(chance.randint(1, MOST_CALLS), after=chance.random() < 0.5)
            begun = sorted({int(name.partition("-")[0]) for name in set(known.tried) - set(known.sure)})
            work(folder, kind, tracer, seed, begun, lambda text: os.write(write, f"{text}\n".encode()))
        except BaseException as error:
            os.write(write, f"failed {error!r}\n".replace("\n", " ").encode())
        os._exit(1)
    os.close(write)
    if by_time:
        time.sleep(chance.uniform(0, LONGEST_S[kind]))
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as stream:
        lines = [line for line in stream.read().splitlines(keepends=True) if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise RuntimeError(f"a worker ended by itself: {lines[-1:]}")
    totals[f"killed_in_{kind}"] += 1
    for line in lines:
        take_down(line.split(), known, totals)


def take_down(words: list[str], known: Known, totals: Counter[str]) -> None:
    match words:
        case ["adding", name, value]:
            known.tried[name] = value
        case ["added", name, value]:
            known.sure[name] = value
            totals["acknowledged"] += 1
        case ["removing", name]:
            known.leaving.add(name)
        case ["removed", name]:
            known.sure.pop(name, None)
            known.leaving.discard(name)
        case ["packed"]:
            totals["packs_finished"] += 1
        case ["failed", *words]:
            raise RuntimeError(" ".join(words))


def work(folder: Path, kind: str, tracer: Tracer, seed: int, begun: list[int], say: Callable[[str], object]) -> None:
    """Change a zoo until somebody ends it; first try again what others began and did not finish."""
    chance = random.Random(seed)
    with Zoo.open(folder, tracer=tracer) as zoo:
        for unfinished in begun[:2]:
            add_some(zoo, chance, say, unfinished)
        while True:
            if kind == "add":
                add_some(zoo, chance, say, chance.randrange(N_FAMILIES))
            else:
                if len(zoo) < 4:
                    add_some(zoo, chance, say, chance.randrange(N_FAMILIES))
                names = [card.name for card in zoo.cards()]
                pack(zoo, models=chance.sample(names, min(N_PACKED, len(names))))
                say("packed")
                for card in zoo.cards():
                    if not card.is_full and chance.random() < 0.2:
                        zoo.unpack(card.name)


def add_some(zoo: Zoo, chance: random.Random, say: Callable[[str], object], seed: int) -> None:
    """Add a family, one by one or together; now and then remove a model, or sweep."""
    models = dict(family(seed, chance.randint(1, 4)))
    for name, state in models.items():
        say(f"adding {name} {digest(state)}")
    if chance.random() < 0.5:
        cards = zoo.add_many(list(models.values()), names=list(models), model=net(), example=EXAMPLE)
    else:
        cards = [zoo.add(state, name=name, model=net(), example=EXAMPLE) for name, state in models.items()]
    for card in cards:
        say(f"added {card.name} {card.digest}")
    if chance.random() < 0.3:
        name = chance.choice([card.name for card in zoo.cards()])
        say(f"removing {name}")
        say(f"removed {zoo.remove(name, unpack=True)[0]}")
    if chance.random() < 0.1:
        zoo.sweep()


def family(seed: int, n: int) -> Iterator[tuple[str, State]]:
    """A network of its own numbers, and descendants that differ a little, half of them in another order of channels."""
    generator = torch.Generator().manual_seed(seed)
    root = {name: torch.randn(value.shape, generator=generator) for name, value in net().state_dict().items()}
    yield f"{seed}-0", root
    for at in range(1, n):
        state = {name: v + 1e-3 * torch.randn(v.shape, generator=generator) for name, v in root.items()}
        if at % 2:
            order = torch.randperm(64, generator=generator)
            state["0.weight"], state["0.bias"] = state["0.weight"][order], state["0.bias"][order]
            state["2.weight"] = state["2.weight"][:, order]
        yield f"{seed}-{at}", state


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))


def die_at_call(n: int, *, after: bool) -> None:
    """Have this process kill itself at its n-th call of the operating system or of SQLite, whichever thread calls."""
    left = [n]

    def watch(_frame: object, event: str, function: Any) -> None:
        if event == ("c_return" if after else "c_call") and getattr(function, "__name__", "") in CALLS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)


def check(folder: Path, known: Known, totals: Counter[str], *, sweep: bool) -> None:
    """Compare what a zoo holds with what is known, as a fresh reader finds it."""
    if not (folder / "zoo.db").is_file():
        totals["lost"] += len(known.sure)
        return
    with Zoo.open(folder) as zoo:
        found = {card.name: card for card in zoo.cards()}
        totals["lost"] += len(set(known.sure) - set(found) - known.leaving)
        for name, card in found.items():
            wanted = known.sure.get(name) or known.tried.get(name)
            totals["wrong"] += card.lossy or wanted != card.digest or read_digest(zoo, name) != wanted
            totals["checked"] += 1
            totals["differences"] += not card.is_full
            known.sure[name] = card.digest
        totals["problems"] += len(zoo.verify())
        if sweep:
            zoo.sweep()
            totals["problems"] += len(zoo.verify())
            again = zoo.sweep()
            totals["left_over"] += 0 if again is None else again.n_files
    for name in known.leaving - set(found):
        known.sure.pop(name, None)
    known.leaving.clear()


def read_digest(zoo: Zoo, name: str) -> str | None:
    try:
        return digest(zoo.state(name))
    except WeightfoldError as error:
        print(error, file=sys.stderr)
        return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    done = main(asked.kills, asked.seed, asked.out)
    sys.exit(1 if done["lost"] or done["wrong"] or done["problems"] or done["left_over"] else 0)
