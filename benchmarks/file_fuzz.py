"""Damaged and hostile files, behind their checksums, through every reader: an error of this library, or what was read.

    python benchmarks/file_fuzz.py [--inputs 1000000] [--seed 0] [--minutes M] [--only FORMAT ...] [--out FILE]

Each input is a legal file that was damaged knowingly (`file_mutations`): bytes, JSON, texts, rows of a table; lengths,
checksums, hashes and fingerprints are made right afterwards, so that the damage is met by the reader and not by its
checksum. One in fifty is left whole, and must give what was written. Input number N of a seed is always the same.

Counted are exceptions that are none of this library, or a crash (`uncaught`); answers that take more than 10 seconds
(`hangs`); values that break their own declarations, or are not those of a whole file (`wrong`); code that a file had
run, imported or started, or a file opened for writing (`executed`, by an audit hook); and the memory that an input
takes beyond 16 MiB, in bytes for each of the file's (`peak_bytes_per_file_byte`). Inputs run in forked processes of
20,000, so that a crash is counted and the rest goes on; each may take 4 GiB. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch
from file_formats import Format
from file_formats_texts import all_formats
from file_mutations import MARK

from weightfold.errors import WeightfoldError

LONGEST_S, STUCK_S = 10.0, 60.0
CHUNK = 20_000
WHOLE = 0.02
FREE_BYTES = 16 << 20
MEMORY = 4 << 30
STARTED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "os.fork",
           "pty.spawn", "ctypes.dlopen", "os.remove", "os.rename", "shutil.rmtree")  # fmt: skip
HARMLESS = (os.devnull, "/proc/self")


class HangError(BaseException):
    """An input takes too long; no `except Exception` on the way keeps it."""


class Tripwire:
    """Notes what a file had run: see the module."""

    def __init__(self, folder: Path) -> None:
        self.armed, self.fired = False, []
        self._folder = str(folder)
        sys.addaudithook(self._look)

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "import" and MARK in str(args[0]):
            self.fired.append(f"imported {args[0]}")
        elif event in STARTED and not all(str(a).startswith(self._folder) for a in args[:1]):
            self.fired.append(f"{event} {str(args)[:100]}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path, flags = os.fsdecode(args[0]), args[2] or 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith((self._folder, *HARMLESS)):
                self.fired.append(f"opened {path[:100]} for writing")


def stop(*_: object) -> None:
    raise HangError


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def place_of(error: BaseException) -> str:
    """What failed, and the last line of this library on the way."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "weightfold" in frame.filename]
    where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno}" if lines else "?"
    return f"{type(error).__name__} at {where}"


class Fuzzer:
    """Runs inputs by number."""

    def __init__(self, seed: int, formats: list[Format], wire: Tripwire) -> None:
        self._seed, self._formats, self._wire = seed, formats, wire
        self._bounds = list(accumulate(one.weight for one in formats))

    def run(self, number: int) -> tuple[str, str, str, float]:
        """One input: format, outcome, what is to be said of it, bytes of memory for each of the file."""
        draw = Random(f"{self._seed}:{number}")
        at = draw.random() * self._bounds[-1]
        one = next(one for one, bound in zip(self._formats, self._bounds, strict=True) if at < bound)
        sample = draw.choice(one.samples)
        whole = draw.random() < WHOLE
        data = one.legal(sample) if whole else one.damage(sample, draw)
        before = peak_bytes()
        signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
        self._wire.armed = True
        try:
            outcome, said = self._read(one, sample, data, whole)
        except HangError:
            outcome, said = "hangs", "took too long"
        finally:
            self._wire.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = max(0, peak_bytes() - before - FREE_BYTES) / max(len(data), 1)
        if self._wire.fired:
            outcome, said = "executed", "; ".join(self._wire.fired[:3])
            self._wire.fired.clear()
        return one.name, outcome, said, grown

    @staticmethod
    def _read(one: Format, sample: Any, data: bytes, whole: bool) -> tuple[str, str]:
        try:
            found = one.read(data)
        except WeightfoldError as error:
            return ("wrong", f"a whole file is refused: {error.message[:100]}") if whole else ("refused", "")
        except Exception as error:
            return "uncaught", f"{place_of(error)}: {str(error)[:100]}"
        try:
            right = one.whole(sample, found) if whole else one.holds(found, data)
        except Exception as error:
            return "wrong", f"{place_of(error)}: {str(error)[:100]}"
        return (
            ("read", "")
            if right
            else ("wrong", "a whole file has other values" if whole else "breaks its declarations")
        )


class Board:
    """What a forked process says while it runs: the input that it is at, in memory that both share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 16)

    def set(self, number: int) -> None:
        self._map[:8] = struct.pack("<q", number)

    def get(self) -> int:
        return struct.unpack("<q", self._map[:8])[0]


def work(fuzzer: Fuzzer, numbers: range, board: Board, out: int, end: float) -> None:
    """In a forked process: run inputs, and send what came of them."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    signal.signal(signal.SIGALRM, stop)
    counts: Counter[str] = Counter()
    said: list[str] = []
    worst, done = (0.0, ""), 0
    for number in numbers:
        if time.time() > end:
            break
        board.set(number)
        name, outcome, text, grown = fuzzer.run(number)
        counts[f"{name}/{outcome}"] += 1
        done += 1
        worst = max(worst, (grown, f"{name}, input {number}"))
        if text and len(said) < 200:
            said.append(f"{outcome}: {name}, input {number}: {text}")
    with os.fdopen(out, "w") as pipe:
        json.dump({"counts": counts, "said": said, "worst": worst, "done": done}, pipe)


def forked(fuzzer: Fuzzer, numbers: range, end: float) -> dict[str, Any]:
    """Run inputs in a process of their own; where it dies, say at which, and how far it came."""
    board = Board()
    board.set(numbers.start)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(fuzzer, numbers, board, writer, end)
        finally:
            os._exit(0)
    os.close(writer)
    last, since, stuck = board.get(), time.time(), False
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.02)
        if board.get() != last:
            last, since = board.get(), time.time()
        elif time.time() - since > STUCK_S:
            stuck = True
            os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    if text:
        return json.loads(text)
    at = board.get()
    kind = "hangs" if stuck else "uncaught"
    return {"counts": {f"process/{kind}": 1}, "said": [f"{kind}: input {at} ended the process"], "worst": (0.0, ""),
            "done": at + 1 - numbers.start}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.time()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        formats = [one for one in all_formats(Path(folder)) if not options.only or one.name in options.only]
        for one in formats:  # what is imported on first use is no memory of an input
            one.read(one.legal(one.samples[0]))
        fuzzer = Fuzzer(options.seed, formats, Tripwire(Path(folder)))
        counts: Counter[str] = Counter()
        worst, at, end = (0.0, ""), 0, start + 60 * options.minutes
        while at < options.inputs and time.time() < end:
            found = forked(fuzzer, range(at, min(at + CHUNK, options.inputs)), end)
            counts.update(found["counts"])
            at += max(found["done"], 1)
            worst = max(worst, tuple(found["worst"]))
            for line in found["said"]:
                print(line, flush=True)
            print(f"{at:,} inputs in {time.time() - start:.0f} s", flush=True)
    result = summary(counts, worst, options.seed, time.time() - start)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def summary(counts: Counter[str], worst: tuple[float, str], seed: int, seconds: float) -> dict[str, Any]:
    """The result, whole and by format."""
    kinds = ("uncaught", "hangs", "wrong", "executed")
    by_format: dict[str, dict[str, int]] = {}
    for key, n in sorted(counts.items()):
        name, outcome = key.rsplit("/", 1)
        by_format.setdefault(name, {})[outcome] = n
    totals = {kind: sum(one.get(kind, 0) for one in by_format.values()) for kind in kinds}
    return {
        "inputs": sum(counts.values()), **totals, "peak_bytes_per_file_byte": round(worst[0], 1), "peak_at": worst[1],
        "seed": seed, "seconds": round(seconds, 1), "torch": torch.__version__, "formats": by_format,
    }  # fmt: skip


if __name__ == "__main__":
    main()
