"""The folder of a run: what is in it, what may be written over, and who may write.

One process at a time works in a folder and holds its lock. A process that is killed leaves the lock's file behind: the
same command then goes on with its run, or begins again where nothing was worth keeping.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from weightfold.artifact import make_folder, write_bytes
from weightfold.artifact.files import drafted, drafts_in
from weightfold.artifact.lock import Lock, locked, look
from weightfold.audit.folder import CHECKPOINT, LOCK, as_text, describe_file, run_digest
from weightfold.errors import ArtifactError, ConfigError

RUN = "run.json"
LEDGER = "ledger.db"
MODEL = "model.safetensors"
PACKED = "model.wfp"
DENSE = "dense.safetensors"
STRUCTURE = "structure.json"
FRONT = tuple(f"front-{k}.wfp" for k in range(1, 17))
REPORT = "report.html"
NEXT = "next.safetensors"
"""A model that is about to take the place of the run's own."""
SWEEP = ("sweep.json", "sweep.svg")
REWIND = f"{LEDGER}.rewind"
_LEDGERS = tuple(f"{name}{end}" for name in (LEDGER, REWIND) for end in ("", "-wal", "-shm", ".jsonl"))
OURS = (RUN, *_LEDGERS, MODEL, NEXT, PACKED, DENSE, STRUCTURE, REPORT, CHECKPOINT, *SWEEP, *FRONT)
HASHED = (LEDGER, MODEL, PACKED, DENSE, STRUCTURE, *FRONT)
FORMAT = 1


Facts = dict[str, Any]


def check(folder: Path, *, force: bool = False) -> None:
    """See whether a new run may use a folder, or an interrupted one go on there, without touching it.

    Args:
        folder: missing or empty, or of a run that was interrupted; with `force` one that holds any run.
        force: whether the files of an earlier run may be removed.
    Raises:
        ConfigError: it is a file, holds something else or a finished run, or another process is at work in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file; a run needs a folder.", remedy="Choose another --out.")
    if folder.is_dir():
        _standing(folder, look(folder / LOCK), force=force)


@contextmanager
def claimed(folder: Path, what: str, *, force: bool = False, **facts: Any) -> Iterator[Facts | None]:
    """Hold a folder for one run; whoever else wants it meanwhile is told.

    Args:
        folder: see `check`; made if it is missing, and gone again if nothing is in it in the end.
        what: the command that works there.
        force: whether the files of an earlier run may be removed.
        facts: what is known of the run before its `run.json` is written.
    Yields:
        run: the `run.json` of an interrupted run to go on with; None to begin, after `clear`. Its status is "done"
            where only what comes after it was cut off.
    Raises:
        ConfigError: see `check`.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    try:
        with locked(folder / LOCK) as lock:
            run = _standing(folder, lock.left, force=force)
            lock.state(what, **facts)
            _sweep(folder)
            yield run
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def working(folder: Path) -> Iterator[Lock]:
    """Hold the folder of a finished run for a change to it; see `claimed`."""
    with locked(folder / LOCK) as lock:
        _sweep(folder)
        yield lock


def begun(folder: Path) -> Facts:
    """What is known of a run that was begun: its `run.json`, or what it stated when it began.

    Raises:
        ConfigError: it is still going on, in another process.
        ArtifactError: the folder holds no run, or a damaged one.
    """
    left = look(folder / LOCK)
    if left is None or (folder / RUN).exists() or "config" not in left:
        return read_run(folder)
    return {"status": "running", **left}


def is_interrupted(folder: Path) -> bool:
    """Whether a process was killed while it worked in a folder.

    Raises:
        ConfigError: one works there.
    """
    return look(folder / LOCK) is not None


def check_same(folder: Path, run: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on with an interrupted run that is another one than what was asked for.

    Args:
        run: its `run.json`.
        wanted: what the new one would state: kind, config, data and the like.
    Raises:
        ConfigError: names the first thing that differs.
    """
    for key, value in json.loads(json.dumps(dict(wanted))).items():
        if run.get(key) == value:
            continue
        name, there, here = key, run.get(key), value
        if isinstance(there, dict) and isinstance(here, dict):
            name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
            there, here = there.get(name), here.get(name)
        raise ConfigError(
            f"'{folder}' holds an interrupted run of other settings: '{name}' is {there!r} there and {here!r} here.",
            remedy=f"Go on with it by the command that began it, write over it by --force, or choose another --out "
            f"than {folder}.",
        )


def _standing(folder: Path, left: Mapping[str, Any] | None, *, force: bool) -> Facts | None:
    """The run to go on with in a folder; None where one may begin."""
    names = {path.name for path in folder.iterdir() if drafted(path.name) not in OURS} - {LOCK}
    if force or not names:
        return None
    if RUN in names:
        run = read_run(folder)
        if run["status"] != "done" or left is not None:
            return run
        raise ConfigError(
            f"The folder '{folder}' is not empty: it holds a finished run.",
            remedy=f"See it by --resume {folder}, write over it by --force, or choose another --out.",
        )
    if left is not None:
        return None
    raise ConfigError(
        f"The folder '{folder}' is not empty.",
        remedy=f"Go on with it by --resume {folder}, write over its run by --force, or choose another --out.",
    )


def _sweep(folder: Path) -> None:
    """Remove half-written files of the run: nobody else writes them while the folder is held."""
    for path in drafts_in(folder):
        if drafted(path.name) in OURS:
            path.unlink(missing_ok=True)


def written_whole(folder: Path, write: Callable[[], Facts]) -> Facts:
    """Write a run that is made at once into a claimed folder: all of it, or nothing."""
    clear(folder)
    try:
        return write()
    except BaseException:
        clear(folder)
        raise


def clear(folder: Path) -> None:
    """Remove the files of a run; its `run.json` goes last, for it says that the others are the run's."""
    for name in reversed(OURS):
        (folder / name).unlink(missing_ok=True)


def write_run(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write `run.json`, with the hashes of a finished run's files and of itself; its ledger is closed by then.

    Returns:
        run: what the file holds.
    """
    run = {"format": FORMAT, **facts}
    if facts["status"] == "done":
        run["files"] = {name: describe_file(folder / name) for name in HASHED if (folder / name).is_file()}
        run["digest"] = run_digest(json.loads(as_text(run)))
    write_bytes(folder / RUN, as_text(run).encode())
    return run


def read_run(folder: Path) -> dict[str, Any]:
    """Read `run.json`.

    Raises:
        ArtifactError: the folder holds no run, or a damaged one.
    """
    path = folder / RUN
    if not path.is_file():
        raise ArtifactError(f"'{folder}' holds no run: there is no {RUN}.", remedy="Pass the --out of an earlier run.")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}", remedy="Start the run anew with --force.") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' is no run of this version of weightfold.", remedy="Start the run anew.")
    return facts
