"""A run's folder used again: its structure rebuilt, its training repeated with the recorded decisions, edits undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from weightfold.artifact import Structure, drafting, read_structure
from weightfold.artifact.lock import Lock
from weightfold.audit.history import Change, History, history_of
from weightfold.blueprint import Blueprint, state_tensors
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export import save_model
from weightfold.export.example import zeros
from weightfold.export.opened import open_model
from weightfold.export.saved import write_structure
from weightfold.export.source import Source
from weightfold.fingerprint import fingerprint
from weightfold.ledger import Entry, Ledger
from weightfold.models import NAMES, TaskSpec, build
from weightfold.replay import Difference, Rebuilt, Replay, rebuild, take_back
from weightfold.size import parameters
from weightfold.training import folder as files
from weightfold.training.config import TrainConfig
from weightfold.training.finish import tensor_digests
from weightfold.training.run import After, Progress, train
from weightfold.training.speed import lost_races

AT_ONCE = ("fold", "lump")
"""Runs that compress a trained network at once."""

Facts = dict[str, Any]
Blob = Callable[[str], bytes]


def rebuild_run(folder: str | Path, *, maker: str | None = None) -> Facts:
    """Rebuild a run's network from the original and the ledger, and compare it with the saved one.

    Args:
        folder: of a finished run.
        maker: package.module:function of a network that is not built in.
    Returns:
        facts: "edits" applied; "same_structure"; "same_weights" where nothing was trained in between, else None;
            "same_start", whether the original has the recorded weights; "first_difference" or None; "unknown" entries.
    Raises:
        ArtifactError: the folder holds no finished run, or a file is damaged.
        LedgerError: the ledger is damaged.
        ConfigError: the network is made by code of the user's own, and no maker was passed.
    """
    folder = Path(folder)
    run = files.read_run(folder)
    with Ledger.open(folder / files.LEDGER, readonly=True) as ledger:
        history = read(ledger)
        model = original(folder, run, maker)
        start = fingerprint(model)
        one_shot = run["kind"] in AT_ONCE and not any(entry.kind == "repair" for entry in history.entries)
        made = rebuild(model, _example(folder, run), history, ledger.get_blob, weights=one_shot)
    difference = made.difference or _unlike(model, folder / files.MODEL, history)
    same = difference is None
    saved = read_structure(folder / files.MODEL)[0]
    return {
        "edits": len(made.applied),
        "undone": len(history.changes) - len(history.standing),
        "same_structure": same,
        "same_weights": (same and fingerprint(model) == saved.fingerprint) if one_shot else None,
        "same_start": start == run["initial_weights"],
        "first_difference": None if difference is None else {**asdict(difference), "text": str(difference)},
        "unknown": [list(item) for item in made.unknown],
    }


def train_again(
    folder: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    maker: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    after: After | None = None,
) -> Facts:
    """Repeat a run's training with its recorded decisions forced, and compare the two.

    Where bits were learned with the weights there is nothing to force: the run is done again as it was.

    Args:
        folder: of a finished training run.
        out: folder of the new run.
        threads: of torch; those of the run by default.
        device: "cpu" or "cuda"; that of the run by default.
        maker: package.module:function of a network that is not built in.
        force: write over the run that `out` holds.
        progress: told after each epoch.
        after: called with the folder of the new run, before others may work in it.
    Returns:
        facts: "same_structure", "same_weights", "same_start"; "first_difference", in words, or None.
    Raises:
        ConfigError: the folder holds no training run with decisions.
    """
    folder, out = Path(folder), Path(out)
    run = files.read_run(folder)
    if run["kind"] != "train" or run["config"]["method"] == "none":
        raise ConfigError(
            f"The run in '{folder}' trained no network that grows smaller: there is nothing to force.",
            remedy="Leave out --train: a network that was folded at once is replayed exactly without.",
        )
    if out.resolve() == folder.resolve():
        raise ConfigError(f"'{out}' is the run that is replayed.", remedy="Choose another --out.")
    with Ledger.open(folder / files.LEDGER, readonly=True) as ledger:
        history = read(ledger)
        learns = run["config"]["method"] == "self_compress"
        forced = None if learns else Replay(history, ledger.get_blob)
        losses = ledger.metrics("folded/loss")
    config = _config(run, threads, device, maker)
    if not learns or not lost_races(history.entries):  # else a clock would decide what is settled already
        config = config.model_copy(update={"race": None})
    again = train(config, out, force=force, progress=progress, forced=forced, after=after)
    with Ledger.open(out / files.LEDGER, readonly=True) as ledger:
        other, other_losses = read(ledger), ledger.metrics("folded/loss")
    first, second = _result(history), _result(other)
    return {
        "edits": len(other.changes),
        **_sameness(history, other, first["arms"]["folded"], second["arms"]["folded"]),
        "same_start": again["initial_weights"] == run["initial_weights"],
        "same_data": again["data"]["fingerprint"] == run["data"]["fingerprint"],
        "first_difference": _first_difference(run, again, losses, other_losses, first, second),
        "scores": [result["arms"]["folded"]["score"] for result in (first, second)],
        "threads": [run["threads"], again["threads"]],
        "devices": [run["device"], again["device"]],
        "heads": [history.head, other.head],
    }


def _sameness(history: History, other: History, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, bool]:
    """Compare the edits of two runs, and what their networks measured at the end."""
    sizes = all(first[key] == second[key] for key in ("widths", "parameters"))
    kept = [(c.step, c.group, c.carry, c.after, c.undone is None) for c in _in_training(history)]
    kept_again = [(c.step, c.group, c.carry, c.after, c.undone is None) for c in _in_training(other)]
    return {
        "same_structure": sizes and kept == kept_again,
        "same_weights": first["fingerprint"] == second["fingerprint"],
    }


def _in_training(history: History) -> list[Change]:
    """Edits as they stood when the run ended: what was taken back after its result counts as standing."""
    end = next((entry.seq for entry in reversed(history.entries) if entry.kind == "result"), len(history.entries))
    return [replace(c, undone=None) if c.undone is not None and c.undone.seq > end else c for c in history.changes]


def read(ledger: Ledger) -> History:
    """Read the history of a ledger that is open."""
    return history_of(tuple(ledger.entries()), ledger.path, ledger.head)


def original(folder: Path, run: Mapping[str, Any], maker: str | None) -> nn.Module:
    """Make the network that a run began with: with its initial weights, where they can be had.

    Raises:
        ConfigError: it is made by code of the user's own, and no maker was passed.
    """
    if run["kind"] in AT_ONCE:
        return open_model(str(folder / files.DENSE), maker=maker).model
    config, task = run["config"], _task(run)
    if config["model"] in NAMES:
        return build(config["model"], task, seed=config["seed"], **config["overrides"])
    from weightfold.data import load_model

    _check_maker(config["model"], folder, maker)
    return load_model(maker or config["model"], task=task, seed=config["seed"])


def _check_maker(name: str, folder: Path, maker: str | None) -> None:
    if maker is None and name not in NAMES:
        raise ConfigError(
            f"'{folder}' holds a network made by '{name}': code that is not run because a file names it.",
            remedy=f"If you trust it, pass --model {name}",
        )


def _example(folder: Path, run: Mapping[str, Any]) -> Any:
    """What the network was traced with: from the data's task, or from the saved model."""
    if run["data"] is not None and "task" in run["data"]:
        return _task(run).example()
    return zeros(read_structure(folder / files.MODEL)[0].inputs)


def _task(run: Mapping[str, Any]) -> TaskSpec:
    return TaskSpec.model_validate(run["data"]["task"])


def _config(run: Mapping[str, Any], threads: int | None, device: str | None, maker: str | None) -> TrainConfig:
    settings = run["config"]
    _check_maker(settings["model"], Path("run.json"), maker)
    changes = {"dense": False, "threads": threads or run["threads"], "device": device or settings["device"]}
    return TrainConfig(**{**settings, **changes, "model": maker or settings["model"]})


def _result(history: History) -> Mapping[str, Any]:
    found = next((entry.body for entry in reversed(history.entries) if entry.kind == "result"), None)
    if found is None or "folded" not in found["arms"]:
        raise ArtifactError(
            f"The run of '{history.path}' is not finished.",
            remedy=f"Go on with it: weightfold train --resume {Path(history.path).parent}",
        )
    return found


def _first_difference(
    run: Facts,
    again: Facts,
    losses: list[tuple[int, float]],
    other: list[tuple[int, float]],
    first: Mapping[str, Any],
    second: Mapping[str, Any],
) -> str | None:
    """Say where two runs part: data, initial weights, the loss of a step, a tensor at the end."""
    for what, a, b in (
        ("The data", run["data"]["fingerprint"], again["data"]["fingerprint"]),
        ("The initial weights", run["initial_weights"], again["initial_weights"]),
    ):
        if a != b:
            return f"{what} differ: {a[:16]} then, {b[:16]} now."
    for (step, a), (_, b) in zip(losses, other, strict=False):
        if a != b:
            return f"The loss differs first at step {step}: {a:.9g} then, {b:.9g} now (by {abs(a - b):.2g})."
    digests, others = (result.get("tensors", {}).get("folded", {}) for result in (first, second))
    for name, digest in digests.items():
        if others.get(name) != digest:
            return f"Every loss is the same; of the final tensors '{name}' is the first that differs."
    return None


def _unlike(model: nn.Module, path: Path, history: History) -> Difference | None:
    """Compare shapes and integer attributes with those of the saved model."""
    structure, header = read_structure(path)
    found = {name: tuple(tensor.shape) for name, tensor in state_tensors(model).items()}
    for name, shape in found.items():
        stored = header.tensors.get(structure.aliases.get(name, name))
        if stored is None or stored.shape != shape:
            return Difference(_seq_of(name, history), f"the shape of '{name}'", stored and stored.shape, shape)
    missing = next((name for name in header.tensors if name not in found), None)
    if missing is not None:
        return Difference(_seq_of(missing, history), f"the tensor '{missing}'", "saved", "missing")
    attributes = Blueprint.of(model).attributes
    for change in structure.attributes:
        place = f"{change.module}.{change.name}".lstrip(".")
        now = attributes.get((change.module, change.name))
        if now != change.after:
            return Difference(_seq_of(place, history), f"the attribute '{place}'", change.after, now)
    return None


def _seq_of(name: str, history: History) -> int:
    """The last edit that touched a tensor or the module of an attribute."""
    module = name.rpartition(".")[0]
    touching = [
        c.seq for c in history.standing if any(t == name or t.rpartition(".")[0] == module for t, *_ in c.members)
    ]
    return touching[-1] if touching else 0


def undo_run(
    folder: str | Path,
    *,
    seq: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    maker: str | None = None,
    after: After | None = None,
) -> Facts:
    """Take edits of a finished run back, the latest one or all down to an entry, and write the wider network.

    Where a process was killed while it replaced the run's own network, the same command finishes that.

    Args:
        folder: of a finished run.
        seq: the earliest edit to take back.
        out: a file for the network; None: replace the run's own, which is recorded in its ledger.
        force: write over `out`, or over the run's model.
        maker: package.module:function of a network that is not built in.
        after: called with the folder of the run whose own network was replaced, before others may work in it.
    Returns:
        facts: "undone" edits with whether each is exact; "exact", whether all are; "parameters" before and after;
            "file".
    Raises:
        ConfigError: there is no edit to take back, no such entry, or a file would be written over.
        LedgerError: an edit stored nothing to go back by.
        ArtifactError: the run is not finished, damaged, or not as its ledger has it.
    """
    folder = Path(folder)
    target = folder / files.MODEL if out is None else Path(out)
    run = files.read_run(folder)
    _check_target(target, folder, out, force=force)
    if out is None and (folder / files.PACKED).exists():
        raise ConfigError(
            f"'{folder / files.PACKED}' holds the network as it is: taken back, it would be another.",
            remedy="Pass --out FILE for the wider network.",
        )
    if out is not None:
        with Ledger.open(folder / files.LEDGER, readonly=True) as ledger:
            source, facts, history = _taken_back(folder, run, ledger, seq, maker)
            _save(source, target, read_structure(folder / files.MODEL)[0].ledger_head)
            return {**facts, "file": str(target), "head": history.head}
    with files.working(folder) as lock:
        facts = _finished(folder, lock) or _replaced(folder, lock, seq, maker)
        if after is not None:
            after(folder)
        return {**facts, "file": str(target)}


def _taken_back(
    folder: Path, run: Facts, ledger: Ledger, seq: int | None, maker: str | None
) -> tuple[Source, Facts, History]:
    """The run's network with its edits taken back, in memory alone."""
    history = read(ledger)
    _check_standing(history, seq)
    twin = original(folder, run, maker)
    made = rebuild(twin, _task(run).example(), history, ledger.get_blob)
    if made.difference is not None:
        raise ArtifactError(
            f"The network of '{folder}' cannot be rebuilt. {made.difference}",
            remedy=f"See where it departs: weightfold ledger replay {folder}",
        )
    source = open_model(str(folder / files.MODEL), maker=maker)
    return source, _undo(source.model, made, ledger.get_blob, seq), history


def _check_target(target: Path, folder: Path, out: str | Path | None, *, force: bool) -> None:
    if target.exists() and not force:
        remedy = "Pass --out FILE, or --force to write over it."
        raise ConfigError(f"'{target}' exists.", remedy=remedy)
    if out is not None and target.resolve() in {(folder / name).resolve() for name in files.OURS}:
        raise ConfigError(
            f"'{target}' belongs to the run.", remedy="Choose another --out; or leave it out, and pass --force."
        )


def _check_standing(history: History, seq: int | None) -> None:
    standing = [change.seq for change in history.standing]
    if not standing:
        raise ConfigError(f"'{history.path}' holds no edit that could be taken back.")
    if seq is not None and seq not in standing:
        raise ConfigError(
            f"Entry {seq} of '{history.path}' is no edit that stands.",
            remedy=f"Edits that stand: {', '.join(map(str, standing))}.",
        )


def _undo(model: nn.Module, made: Rebuilt, get_blob: Blob, seq: int | None) -> Facts:
    n_before = parameters(model)
    undone = take_back(model, made, get_blob, seq)
    return {
        "undone": [_undone(change, exact) for change, exact in undone],
        "exact": all(exact for _, exact in undone),
        "parameters": [n_before, parameters(model)],
        "fingerprint": fingerprint(model),
        "unknown": [list(item) for item in made.unknown],
    }


def _undone(change: Change, exact: bool) -> Facts:
    return {
        "seq": change.seq,
        "group": change.group,
        "step": change.step,
        "channels": [len(change.carry), len(change.original)],
        "exact": exact,
    }


def _save(source: Source, path: Path, head: str | None) -> Structure:
    with drafting(path) as draft:
        return save_model(
            source.model, draft, before=source.before, builder=source.builder, inputs=source.inputs, ledger_head=head
        )


def _replaced(folder: Path, lock: Lock, seq: int | None, maker: str | None) -> Facts:
    """Put the network in the place of the run's own, and record it.

    The network lies whole beside the run's own, and what is to be done is stated, before the ledger says that it was
    done; so whoever is killed after that has only to move files, and before that nothing has happened.
    """
    run = files.read_run(folder)
    with Ledger.open(folder / files.LEDGER) as ledger:
        source, facts, history = _taken_back(folder, run, ledger, seq, maker)
        body = _undo_body(source.model, facts)
        promised = Entry.after((history.entries[-1].seq, history.head), "undo", body, {})
        since = {"seq": promised.seq, "head": promised.hash, "undone": facts["undone"]}
        _save(source, folder / files.NEXT, promised.hash)
        lock.state("ledger undo", since=since, facts=facts)
        try:
            ledger.append("undo", body)
        except BaseException:
            (folder / files.NEXT).unlink(missing_ok=True)
            raise
    return _moved(folder, since, facts)


def _finished(folder: Path, lock: Lock) -> Facts | None:
    """Finish what a process that was killed had recorded and not yet done; None where there is nothing."""
    left = lock.left or {}
    with Ledger.open(folder / files.LEDGER, readonly=True) as ledger:
        recorded = "since" in left and ledger.head == left["since"]["head"]
    if recorded:
        lock.state("ledger undo", since=left["since"], facts=left["facts"])
        return _moved(folder, left["since"], left["facts"])
    (folder / files.NEXT).unlink(missing_ok=True)
    return None


def _moved(folder: Path, since: Facts, facts: Facts) -> Facts:
    """Give the network its name, and have the run's other files say what the ledger says."""
    if (folder / files.NEXT).is_file():
        (folder / files.NEXT).replace(folder / files.MODEL)
    write_structure(read_structure(folder / files.MODEL)[0], folder)
    run = files.read_run(folder)
    known = [item for item in run.get("since", []) if item["seq"] != since["seq"]]
    files.write_run(folder, {key: value for key, value in run.items() if key != "digest"} | {"since": [*known, since]})
    return {**facts, "head": since["head"]}


def _undo_body(model: nn.Module, facts: Facts) -> Facts:
    undone = facts["undone"]
    return {
        "undoes": [item["seq"] for item in undone],
        "groups": [item["group"] for item in undone],
        "how": "after the run, bit for bit" if facts["exact"] else "after the run, with what was trained since",
        "exact": facts["exact"],
        "parameters": facts["parameters"][1],
        "fingerprint": facts["fingerprint"],
        "tensors": {"folded": tensor_digests(model)},
    }
