"""`weightfold ledger verify`: find what was changed."""

from __future__ import annotations

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.ledger.common import Source


@guarded
def verify(source: Source, as_json: Json = False) -> None:
    """Check every entry, link, blob and metric; in the folder of a run also its models and its other files."""
    from weightfold.audit.folder import verify_folder, verify_ledger

    facts = verify_folder(source) if source.is_dir() else verify_ledger(source)
    if as_json:
        show.print_json({"valid": True, **facts})
        return
    console = show.console()
    console.print(
        f"[green]intact[/]  {facts['entries']} entries, each tied to the one before; {facts['blobs']} stored blobs, "
        f"{facts['metrics']:,} metrics"
    )
    if facts["model"] is not None:
        console.print(f"[green]intact[/]  {facts['model']} carries this head, and its tensors have their fingerprint")
    for name in facts["files"]:
        console.print(f"[green]intact[/]  {name}")
    for name in facts["unchecked"]:
        console.print(f"[dim]not checked  {name}[/]")
    if facts["unfinished"]:
        console.print("[yellow]unfinished[/]  the run goes on, or was interrupted: the command that began it goes on")
    console.print(f"head    {facts['head']}")
