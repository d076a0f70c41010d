"""Check the whole folder of a run: a changed byte is found wherever it lies, and named by file, tensor or entry.

The ledger's chain covers entries, blobs and metrics. Its last result names a digest of every tensor of the saved
models. The models carry the ledger's head. `run.json` names the hashes of the files beside it and has one itself;
the report ends with its own. Whoever can write all of these at once can forge them together: compare the head with a
copy kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightfold.artifact import Header, Structure, fingerprint, read_structure, write_bytes
from weightfold.artifact.header import parse_header
from weightfold.artifact.packed import fingerprint_of, read_packed
from weightfold.audit.history import ledger_file
from weightfold.errors import ArtifactError, LedgerError
from weightfold.ledger import Entry, Ledger
from weightfold.ledger.entry import RESTORE

LOCK = "run.lock"
"""Held by the process that works in a folder; where it was killed, the file stays."""
CHECKPOINT = "checkpoint.safetensors"
"""What an interrupted training goes on from."""
OF_A_RUN = {"config", "versions", "initial_weights"}
"""What entry 0 of a run of weightfold holds, whose folder then holds `run.json`."""
MODELS = {"model.safetensors": ("folded", "dense"), "dense.safetensors": ("dense",)}
AGAIN = "Copy the file again, or do the run again: the same settings, machine and threads give the same file."
PACKED = "model.wfp"
SELF = b"<!-- sha256 of all above: "
"""Begins the last line of a report."""


def verify_ledger(source: Path) -> dict[str, Any]:
    """Check a ledger, and that the blobs its entries name are there and hold tensors.

    Returns:
        facts: head, counts of entries, blobs and metrics; model None, files and unchecked empty, unfinished False.
    Raises:
        LedgerError: the first thing that is wrong; names the entry, blob or metric.
    """
    with Ledger.open(ledger_file(source), readonly=True) as ledger:
        ledger.verify()
        for entry in ledger.entries():
            _check_blobs(ledger, entry)
        counts = {"entries": len(ledger), "blobs": ledger.n_blobs, "metrics": ledger.n_metrics}
        return {"head": ledger.head, **counts, "model": None, "files": [], "unchecked": [], "unfinished": False}


def verify_folder(folder: Path) -> dict[str, Any]:
    """Check the folder of a run.

    Returns:
        facts: those of `verify_ledger`; the model's file, every further file that is intact, those that nothing covers.
    Raises:
        LedgerError: the ledger is damaged, or the files stand at another head.
        ArtifactError: another file was changed; names it, and the tensor where one was.
    """
    facts = verify_ledger(folder)
    with Ledger.open(ledger_file(folder), readonly=True) as ledger:
        entries = list(ledger.entries())
    for name in MODELS:
        if (folder / name).is_file():
            _check_model(folder / name, entries, facts["head"])
    if (folder / PACKED).is_file():
        _check_packed(folder / PACKED, entries, facts["head"])
    run = _check_run(folder, entries)
    _check_report(folder / "report.html")
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    covered = {*MODELS, PACKED, "structure.json", "report.html", "run.json"} & set(found)
    if run is None:
        covered -= {"run.json", "structure.json"}
    facts["model"] = "model.safetensors" if "model.safetensors" in covered else None
    facts["files"] = sorted(covered - {"model.safetensors"})
    beside = {LOCK, CHECKPOINT} if run is None else {LOCK}
    facts["unchecked"] = [n for n in found if n not in covered | beside and not n.startswith("ledger.db")]
    facts["unfinished"] = run is None and entries[0].body.keys() >= OF_A_RUN
    return facts


def _check_blobs(ledger: Ledger, entry: Entry) -> None:
    for what, digest in _digests(entry.body):
        where = f"The {what} of entry {entry.seq} of '{ledger.path}'"
        try:
            data = ledger.get_blob(digest)
        except LedgerError as error:
            raise LedgerError(f"{where} cannot be read: {error.message}", remedy=RESTORE) from None
        try:
            parse_header(data, where)
        except ArtifactError as error:
            raise LedgerError(error.message, remedy=RESTORE) from None


def _digests(body: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Blobs that an edit names: its maps, and what it replaced."""
    what, proof = body.get("what"), body.get("proof")
    edit = what.get("edit") if isinstance(what, dict) else None
    found = [("maps", edit.get("maps"))] if isinstance(edit, dict) else []
    found += [("undo blob", proof.get("undo"))] if isinstance(proof, dict) else []
    return [(name, digest) for name, digest in found if isinstance(digest, str)]


def _check_model(path: Path, entries: list[Entry], head: str) -> None:
    structure, header = read_structure(path)
    if path.name == "model.safetensors" or structure.ledger_head not in _heads_since_result(entries):
        _check_head(path, structure, head)
    for name, digest in _tensor_digests(path.name, entries).items():
        if name not in header.tensors:
            raise ArtifactError(f"'{path}' lacks the tensor '{name}' that the ledger knows.", remedy=AGAIN)
        if fingerprint(path, Header({name: header.tensors[name]}, {}, 0))[: len(digest)] != digest:
            raise ArtifactError(f"The tensor '{name}' in '{path}' was changed: the ledger knows another.", remedy=AGAIN)
    if fingerprint(path, header, structure.aliases) != structure.fingerprint:
        raise ArtifactError(
            f"The tensors in '{path}' were changed: they do not have the fingerprint it gives.", remedy=AGAIN
        )


def _check_packed(path: Path, entries: list[Entry], head: str) -> None:
    """Check that a packed file decodes to the tensors that the ledger knows."""
    packed = read_packed(path)
    _check_head(path, packed.structure, head)
    arrays = packed.arrays()
    for name, digest in _tensor_digests("model.safetensors", entries).items():
        if name not in arrays:
            raise ArtifactError(f"'{path}' lacks the tensor '{name}' that the ledger knows.", remedy=AGAIN)
        if fingerprint_of({name: arrays[name]}, {})[: len(digest)] != digest:
            raise ArtifactError(f"The tensor '{name}' in '{path}' was changed: the ledger knows another.", remedy=AGAIN)


def _heads_since_result(entries: list[Entry]) -> set[str]:
    """Heads at which a run's dense network may stand: edits that were taken back later leave it alone."""
    last = max((entry.seq for entry in entries if entry.kind == "result"), default=len(entries))
    return {entry.hash for entry in entries[last:] if entry.kind in ("result", "undo")}


def _check_head(path: Path, structure: Structure, head: str) -> None:
    if structure.ledger_head != head:
        raise LedgerError(
            f"'{path}' was saved when the ledger's head was {structure.ledger_head}; now it is {head}.",
            remedy="Entries were cut off or added since, or the model is that of another run.",
        )


def _tensor_digests(file: str, entries: list[Entry]) -> Mapping[str, str]:
    """Digests of a model's tensors as the last entry that names them has them."""
    for entry in reversed(entries):
        by_arm = entry.body.get("tensors", {}) if entry.kind in ("result", "undo") else {}
        for arm in MODELS[file]:
            if arm in by_arm:
                return by_arm[arm]
    return {}


def _check_run(folder: Path, entries: list[Entry]) -> dict[str, Any] | None:
    """Check `run.json` and the files that it names; None if there is none, or one of a run that goes on.

    A ledger of a run has a `run.json` beside it as soon as nobody works there, and one with a result is that of a
    finished run, unless there is something to go on from.
    """
    path = folder / "run.json"
    if not path.is_file():
        if entries[0].body.keys() >= OF_A_RUN and not (folder / LOCK).exists():
            raise ArtifactError(f"'{path}' is missing; the run wrote it.", remedy=AGAIN)
        return None
    run = _read_run(path)
    if run.get("status") == "running" and "digest" not in run:
        if any(entry.kind == "result" for entry in entries) and not _goes_on(folder):
            raise ArtifactError(f"'{path}' was changed: the ledger tells of a run that is finished.", remedy=AGAIN)
        return None
    for name, stated in run.get("files", {}).items():
        _check_file(folder / name, stated)
    for name in run.get("written", ()):
        if not (folder / name).is_file():
            raise ArtifactError(f"'{folder / name}' is missing; it was written with the run.", remedy=AGAIN)
    _check_agreement(path, run, entries)
    return run


def _read_run(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8")
        run = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}.", remedy=AGAIN) from None
    if not isinstance(run, dict):
        raise ArtifactError(f"'{path}' is no record of a run.", remedy=AGAIN)
    if run.get("status") == "running" and "digest" not in run:
        return run
    if "digest" not in run:
        raise ArtifactError(
            f"'{path}' gives no digest of itself: it was changed, or is of an older version.", remedy=AGAIN
        )
    if run_digest(run) != run["digest"] or text != as_text(run):
        raise ArtifactError(f"'{path}' was changed: it does not have the digest it gives.", remedy=AGAIN)
    return run


def _goes_on(folder: Path) -> bool:
    return (folder / LOCK).exists() or (folder / CHECKPOINT).exists()


def note_written(folder: Path, name: str) -> None:
    """Have `run.json` say that a file made from it lies beside it, so that its loss is noticed.

    One that was changed stays as it is, for `verify_folder` to find: it gets no new digest.
    """
    path = folder / "run.json"
    try:
        run = _read_run(path)
    except ArtifactError:
        return
    if "digest" not in run or name in run.get("written", ()):
        return
    run["written"] = sorted([*run.get("written", ()), name])
    run["digest"] = run_digest(run)
    write_bytes(path, as_text(run).encode())


def run_digest(run: Mapping[str, Any]) -> str:
    """Hash what `run.json` holds, but for the digest itself."""
    rest = {key: value for key, value in run.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def as_text(run: Mapping[str, Any]) -> str:
    """The text of `run.json`, byte for byte."""
    return json.dumps(run, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file, for `run.json`."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _check_file(path: Path, stated: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise ArtifactError(f"'{path}' is missing; the run wrote it.", remedy=AGAIN)
    if describe_file(path) == stated:
        return
    if path.suffix == ".db":
        raise ArtifactError(
            f"'{path}' was changed outside its rows: all that it records is intact, but the file is another.",
            remedy="Copy it again. To check the record alone, verify the ledger file instead of the folder.",
        )
    part = "its header or metadata" if path.suffix == ".safetensors" else "its contents"
    raise ArtifactError(f"'{path}' was changed: {part} are not what the run wrote.", remedy=AGAIN)


def _check_agreement(path: Path, run: Mapping[str, Any], entries: list[Entry]) -> None:
    """Compare what `run.json` repeats of the ledger."""
    first, last = entries[0].body, next((e for e in reversed(entries) if e.kind == "result"), None)
    for key, value in first.items():
        if key in run and run[key] != value:
            raise ArtifactError(f"'{path}' gives another '{key}' than entry 0 of the ledger.", remedy=AGAIN)
    if last is None or "results" not in run:
        return
    for arm, facts in last.body.get("arms", {}).items():
        for key, value in facts.items():
            if run["results"].get("arms", {}).get(arm, {}).get(key) != value:
                raise ArtifactError(
                    f"'{path}' gives another '{key}' of the {arm} network than entry {last.seq} of the ledger.",
                    remedy=AGAIN,
                )


def _check_report(path: Path) -> None:
    if not path.is_file():
        return
    data = path.read_bytes()
    page, mark, _ = data.rpartition(SELF)
    if not mark or data != sealed(page):
        raise ArtifactError(f"'{path}' was changed: it does not have the hash it ends with.", remedy=AGAIN)


def sealed(page: bytes) -> bytes:
    """Add the hash of a page as its last line."""
    return page + SELF + hashlib.sha256(page).hexdigest().encode() + b" -->\n"
