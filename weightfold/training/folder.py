"""The folder of a run: what is in it, and what may be written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weightfold.artifact import make_folder, write_bytes
from weightfold.audit.folder import as_text, describe_file, run_digest
from weightfold.errors import ArtifactError, ConfigError

RUN = "run.json"
LEDGER = "ledger.db"
MODEL = "model.safetensors"
PACKED = "model.wfp"
DENSE = "dense.safetensors"
STRUCTURE = "structure.json"
FRONT = tuple(f"front-{k}.wfp" for k in range(1, 17))
REPORT = "report.html"
CHECKPOINT = "checkpoint.safetensors"
OURS = (RUN, LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", MODEL, PACKED, DENSE, STRUCTURE, REPORT, CHECKPOINT, *FRONT)
HASHED = (LEDGER, MODEL, PACKED, DENSE, STRUCTURE, *FRONT)
FORMAT = 1


def check(folder: Path, *, force: bool = False) -> None:
    """See whether a new run may use a folder, without touching it.

    Args:
        folder: missing or empty, or with `force` one that holds a run.
        force: whether the files of an earlier run may be removed.
    Raises:
        ConfigError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"'{folder}' is a file; a run needs a folder.", remedy="Choose another --out.")
    if force or not folder.is_dir() or not any(folder.iterdir()):
        return
    raise ConfigError(
        f"The folder '{folder}' is not empty.",
        remedy=f"Go on with it by --resume {folder}, write over its run by --force, or choose another --out.",
    )


def claim(folder: Path, *, force: bool = False) -> None:
    """Make a folder for a new run, and remove the files of an earlier one if that is wanted; see `check`."""
    check(folder, force=force)
    clear(folder)
    make_folder(folder)


def clear(folder: Path) -> None:
    """Remove the files of a run, and the folder if nothing else is in it."""
    if not folder.is_dir():
        return
    for name in OURS:
        (folder / name).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


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
