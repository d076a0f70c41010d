"""Kill -9 at any moment: the same command, given once more, ends as if nothing had happened.

    python benchmarks/kills.py [--runs 300] [--seed 0] [--minutes M] [--out FILE]

Five commands (train, fold, zoo add, zoo pack, export) are run through the command line in processes that are forked
from one that has done it all before, killed after a random share of their time, and given again; a third of those that
go on are killed once more. Each result is compared with that of a run that nobody disturbed: heads and bytes of a run's
files, tensors of a zoo, outputs of an exported file. Pairs of trainers are started on one folder at the same moment.

    kills            processes that were killed
    lost             commands that, given again, did not finish, or left something missing or damaged
    half_written     files that were cut off or left over, after a kill under their own name, in the end under any name
    different_heads  results that are not those of the undisturbed run
    trainers         pairs; in how many one won, and in how many the other was told who

The last line is one JSON object. At most `--minutes` are spent; what fits in is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weightfold import __version__
from weightfold.artifact import Builder, Input, read_header
from weightfold.artifact.files import drafted
from weightfold.audit.folder import LOCK, verify_folder
from weightfold.cli.main import app
from weightfold.errors import WeightfoldError
from weightfold.export import Blueprint, load, save_model
from weightfold.fingerprint import digest
from weightfold.ledger import Ledger
from weightfold.models import Classes, TableInput, TaskSpec, build
from weightfold.zoo.store import Zoo

TASK = TaskSpec(input=TableInput(n_features=6), output=Classes(n=2))
SMALL = ("--model", "mlp", "--set", "hidden=12,12", "--epochs", "3", "--batch-size", "16", "--threads", "1")
TRAIN = ("train", "data.csv", *SMALL, "--at", "0.4", "--max-increase", "1000", "--device", "cpu", "--out", "run")
COMMANDS = {
    "train": TRAIN,
    "fold": ("fold", "net.safetensors", "--data", "data.csv", "--samples", "32", "--out", "run"),
    "zoo add": ("zoo", "add", "zoo", "models"),
    "zoo pack": ("zoo", "pack", "zoo"),
    "export": ("export", "net.safetensors", "--to", "pt2", "--out", "run/net.pt2"),
}
N_MODELS = 6
RUNS_A_PAIR = 8


@dataclass(frozen=True)
class Reference:
    """A command that nobody disturbed: how long it takes, and what it leaves."""

    seconds: float
    result: Any


def main(runs: int, seed: int, minutes: float, out: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    start, chance = time.perf_counter(), random.Random(seed)
    totals: Counter[str] = Counter(dict.fromkeys(("kills", "lost", "half_written", "different_heads"), 0))
    trainers: Counter[str] = Counter(dict.fromkeys(("pairs", "one_won", "told"), 0))
    done: Counter[str] = Counter()
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        template = Path(scratch, "template")
        make_template(template)
        warm_up(template, Path(scratch, "warm"))
        references = {kind: undisturbed(template, Path(scratch, "whole"), kind) for kind in COMMANDS}
        for at in range(runs):
            if time.perf_counter() - start > 60 * minutes:
                break
            kind = list(COMMANDS)[at % len(COMMANDS)]
            notes += disturbed(template, Path(scratch, "cut"), kind, references[kind], chance, totals)
            done[kind] += 1
            if at % RUNS_A_PAIR == 0:
                two_trainers(template, Path(scratch, "pair"), trainers)
    record = {
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "torch": torch.__version__,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "runs": dict(done),
        "notes": notes[:20],
        **totals,
        "trainers": dict(trainers),
    }
    print(json.dumps(record))
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")
    return record


def make_template(folder: Path) -> None:
    """Data, a network, models to add, and a zoo to pack."""
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    lines = [",".join(f"{x:.4f}" for x in row) for row in torch.randn(60, 6, generator=g).tolist()]
    text = "\n".join(f"{line},{'no' if line.startswith('-') else 'yes'}" for line in lines)
    (folder / "data.csv").write_text(f"a,b,c,d,e,f,label\n{text}\n")
    net = build("mlp", TASK, seed=0, hidden=(12, 12)).eval()
    builder = Builder(kind="built-in", name="mlp", task=TASK.model_dump(mode="json"), overrides={"hidden": [12, 12]})
    inputs = (Input(shape=(1, 6)),)
    save_model(net, folder / "net.safetensors", before=Blueprint.of(net), builder=builder, inputs=inputs)
    (folder / "models").mkdir()
    parent = torch.randn(64, 64, generator=g)
    for at in range(N_MODELS):
        child = parent + 0.01 * torch.randn(64, 64, generator=g)
        save_file({"w": child}, folder / "models" / f"m{at}.safetensors")


def fresh(template: Path, folder: Path, kind: str) -> None:
    """Make the folder that a command starts in."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    if kind == "zoo pack":
        with Zoo.open(folder / "zoo") as zoo:
            zoo.add_many(sorted((folder / "models").iterdir()))


def warm_up(template: Path, folder: Path) -> None:
    """Run every command once in this process, so that its children have nothing left to import."""
    here = Path.cwd()
    for kind, arguments in COMMANDS.items():
        fresh(template, folder, kind)
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            app([*arguments])
        os.chdir(here)


def started(folder: Path, arguments: tuple[str, ...], at: float = 0.0) -> int:
    """Run the command line in a process of its own, from a moment on; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        log = os.open(f"log-{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        time.sleep(max(0.0, at - time.time()))
        app([*arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said(folder: Path, child: int) -> str:
    """What a process printed."""
    return " ".join((folder / f"log-{child}.txt").read_text(errors="replace").split())[-300:]


def undisturbed(template: Path, folder: Path, kind: str) -> Reference:
    """Run a command to its end."""
    fresh(template, folder, kind)
    start = time.perf_counter()
    child = started(folder, COMMANDS[kind])
    if ended(child) != 0:
        raise SystemExit(f"{kind} fails undisturbed: {said(folder, child)}")
    return Reference(time.perf_counter() - start, result_of(folder, kind))


def disturbed(
    template: Path, folder: Path, kind: str, whole: Reference, chance: random.Random, totals: Counter[str]
) -> list[str]:
    """Kill a command, give it again, perhaps kill that too, and look at what is left; says what went wrong."""
    fresh(template, folder, kind)
    notes: list[str] = []
    for _ in range(2 if chance.random() < 1 / 3 else 1):
        child = started(folder, COMMANDS[kind])
        time.sleep(chance.random() * whole.seconds)
        os.kill(child, signal.SIGKILL)
        if ended(child) == -signal.SIGKILL:
            totals["kills"] += 1
        for path in cut_off(folder):
            totals["half_written"] += 1
            notes.append(f"{kind}: {path.name} was cut off by a kill")
    if not is_finished(folder, kind):
        child = started(folder, COMMANDS[kind])
        if ended(child) != 0:
            totals["lost"] += 1
            return [*notes, f"{kind}: {said(folder, child)}"]
    for path in left_over(folder):
        totals["half_written"] += 1
        notes.append(f"{kind}: {path.name} was left over")
    try:
        found = result_of(folder, kind)
    except (WeightfoldError, OSError, ValueError, KeyError) as error:
        totals["lost"] += 1
        return [*notes, f"{kind}: {error!r}"]
    if found != whole.result:
        totals["different_heads"] += 1
        notes.append(f"{kind}: {found} instead of {whole.result}")
    return notes


def is_finished(folder: Path, kind: str) -> bool:
    """Whether a killed command had done all its work: a finished run is not written over."""
    run = folder / "run" / "run.json"
    if kind not in ("train", "fold") or not run.is_file() or (run.parent / LOCK).exists():
        return False
    return json.loads(run.read_text())["status"] == "done"


def cut_off(folder: Path) -> list[Path]:
    """Files under their own names that are not whole."""
    return [path for path in folder.rglob("*") if path.is_file() and not drafted(path.name) and not _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            read_header(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt2":
            load(path)
        elif path.name == "report.html":
            return path.read_bytes().endswith(b" -->\n")
        elif path.name == "ledger.db":
            with Ledger.open(path) as ledger:
                ledger.verify()
        elif path.parent.parent.name == "blobs" and not path.name.startswith("."):
            return hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    except (WeightfoldError, ValueError):
        return False
    return True


def left_over(folder: Path) -> list[Path]:
    """Drafts and marks of killed processes that nobody took away; a zoo's go with its next sweep."""
    if (folder / "zoo").is_dir():
        with Zoo.open(folder / "zoo") as zoo:
            zoo.sweep()
    return [path for path in folder.rglob("*") if drafted(path.name) or path.name.startswith(".") or path.name == LOCK]


def result_of(folder: Path, kind: str) -> Any:
    """What must be the same, and that all of it is whole."""
    if kind == "export":
        args = torch.linspace(-1, 1, 18).reshape(3, 6)
        return digest({"outputs": load(folder / "run" / "net.pt2")(args)})
    if kind in ("zoo add", "zoo pack"):
        with Zoo.open(folder / "zoo") as zoo:
            problems = zoo.verify()
            if problems:
                raise ValueError(problems[0].message)
            packed = kind == "zoo add" or any(card.base is not None for card in zoo.cards())
            return packed, sorted((card.name, digest(zoo.state(card.name))) for card in zoo.cards())
    facts = verify_folder(folder / "run")
    names = ("model.safetensors", "dense.safetensors", "structure.json")
    files = {name: hashlib.sha256((folder / "run" / name).read_bytes()).hexdigest() for name in names}
    return facts["head"], facts["model"], facts["files"], facts["unchecked"], files


def two_trainers(template: Path, folder: Path, trainers: Counter[str]) -> None:
    """Start two trainers on one folder at the same moment."""
    fresh(template, folder, "train")
    moment = time.time() + 0.2
    children = [started(folder, TRAIN, moment) for _ in range(2)]
    codes = [ended(child) for child in children]
    trainers["pairs"] += 1
    trainers["one_won"] += sorted(codes) == [0, 2] and verify_folder(folder / "run")["model"] is not None
    losers = [child for child, code in zip(children, codes, strict=True) if code != 0]
    winners = [child for child, code in zip(children, codes, strict=True) if code == 0]
    trainers["told"] += all(f"pid {winner}," in said(folder, loser) for loser in losers for winner in winners)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    main(options.runs, options.seed, options.minutes, options.out)
