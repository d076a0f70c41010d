"""`weightfold ledger`: read the record of a run, and check it. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded

app = typer.Typer(no_args_is_help=True, help="Read the record of a run, and check it.")

Source = Annotated[Path, typer.Argument(metavar="RUN|FILE", help="Folder of a run, or a ledger file.")]


@app.command("show")
@guarded
def show_entries(
    source: Source,
    group: Annotated[str | None, typer.Option(help="Only entries about this channel group.")] = None,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last N entries.", metavar="N")] = None,
    as_json: Json = False,
) -> None:
    """List what was changed, when, at what cost, and what was refused."""
    from weightfold.ledger import Ledger

    with Ledger.open(ledger_file(source), readonly=True) as ledger:
        entries = [entry for entry in ledger.entries() if group is None or group_of(entry.body) == group]
        groups = {group_of(entry.body) for entry in ledger.entries()} - {""} if group is not None else set()
        head, path = ledger.head, ledger.path
    if group is not None and not entries:
        from weightfold.config import nearest
        from weightfold.errors import ConfigError

        known = nearest(group, groups) if groups else "It names no group at all."
        raise ConfigError(f"No entry of '{path}' is about the group '{group}'.", remedy=known)
    entries = entries[-last:] if last else entries
    if as_json:
        show.print_json([_record(entry) for entry in entries])
        return
    columns = ("seq", "kind", "group", "channels", "predicted", "measured", "hash", "")
    show.table(columns, [_row(entry) for entry in entries], right=(0, 3, 4, 5))
    show.console().print(f"head {head}")


@app.command("verify")
@guarded
def verify(source: Source, as_json: Json = False) -> None:
    """Check every entry, link, blob and metric; in the folder of a run also the saved model against the last entry."""
    from weightfold.ledger import Ledger

    file = ledger_file(source)
    with Ledger.open(file, readonly=True) as ledger:
        ledger.verify()
        head, n_entries = ledger.head, len(ledger)
    model = check_model(source, head) if source.is_dir() else None
    if as_json:
        show.print_json({"valid": True, "entries": n_entries, "head": head, "model": model})
        return
    console = show.console()
    console.print(f"[green]intact[/]  {n_entries} entries, each tied to the one before")
    if model is not None:
        console.print(f"[green]intact[/]  {model} carries this head, and its tensors have their fingerprint")
    console.print(f"head    {head}")


def ledger_file(source: Path) -> Path:
    """Find the ledger in a run's folder, or take the file itself."""
    return source / "ledger.db" if source.is_dir() else source


def check_model(folder: Path, head: str) -> str | None:
    """Compare a run's model with the head of its ledger.

    Returns:
        name: of the model's file; None if there is none yet.
    Raises:
        LedgerError: the model was saved at another head: entries were cut off, or added.
        ArtifactError: the model's tensors were changed.
    """
    from weightfold.artifact import fingerprint, read_structure
    from weightfold.errors import ArtifactError, LedgerError

    path = folder / "model.safetensors"
    if not path.exists():
        return None
    structure, header = read_structure(path)
    if structure.ledger_head != head:
        raise LedgerError(
            f"'{path}' was saved when the ledger's head was {structure.ledger_head}; now it is {head}.",
            remedy="Entries were cut off or added since, or the model is that of another run.",
        )
    if fingerprint(path, header, structure.aliases) != structure.fingerprint:
        raise ArtifactError(f"The tensors in '{path}' were changed: they do not have the fingerprint it gives.")
    return path.name


def group_of(body: dict[str, Any]) -> str:
    """Name the channel group that an entry is about."""
    what = body.get("what")
    inner = what.get("group", "") if isinstance(what, dict) else ""
    return str(body.get("group", inner))


def _record(entry: Any) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("seq", "kind", "time", "body", "aside", "prev", "hash")}


def _row(entry: Any) -> list[str]:
    facts = summary(entry.kind, entry.body)
    mark = {"edit": "[green]edit[/]", "rollback": "[red]rollback[/]", "refusal": "[red]refusal[/]"}
    return [
        str(entry.seq),
        mark.get(entry.kind, show.plain(entry.kind)),
        show.plain(facts["group"]),
        facts["channels"],
        "" if facts["predicted"] is None else f"{facts['predicted']:.2g}",
        "" if facts["measured"] is None else f"{facts['measured']:+.2g}".replace("-", "−"),
        entry.hash[:12],
        show.plain(facts["remark"]),
    ]


def summary(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """Pick what fits on one line out of an entry."""
    facts: dict[str, Any] = {
        "group": group_of(body), "channels": "", "predicted": None, "measured": None, "remark": "",
    }  # fmt: skip
    if kind == "edit":
        edit, price = body["what"]["edit"], body["price"]
        last = price["attempts"][-1] if price["attempts"] else {}
        facts["channels"] = f"{edit['channels']} → {len(edit['carry'])}"
        facts["predicted"], facts["measured"] = price["predicted"], _number(last.get("mean"))
        facts["remark"] = f"{body['method']} at step {body['step']}"
    elif kind == "rollback":
        last = body["attempts"][-1]
        facts["predicted"], facts["measured"] = _number(last.get("predicted")), _number(last.get("mean"))
        facts["remark"] = f"step {body['step']}: {last['reason']}"
    elif kind == "refusal":
        facts["remark"] = f"step {body['step']}: {str(body['why']).partition(chr(10))[0]}"
    elif kind == "prepare":
        facts["remark"] = f"{len(body['groups'])} groups, {len(body['frozen'])} frozen axes"
    elif kind == "run":
        facts["remark"] = f"seed {body['config']['seed']}" if "config" in body else ""
    elif kind == "convert":
        facts["remark"] = f"{body['parameters']:,} parameters"
    elif kind == "result":
        scores = ", ".join(f"{name} {arm['score']:.4f}" for name, arm in body["arms"].items())
        facts["remark"] = f"test: {scores}"
    return facts


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
