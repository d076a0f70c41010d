"""`weightfold zoo pack`: keep models as differences to their relatives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Shapes
from weightfold.cli.zoo.common import Folder, size

if TYPE_CHECKING:
    from weightfold.zoo.delta.steps import Lossy
    from weightfold.zoo.pack import Packed, Row
    from weightfold.zoo.store import Zoo

N_SHOWN = 30


@guarded
def pack(
    zoo: Folder,
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Only these; all if none is named.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be gained.")] = False,
    lossy: Annotated[
        float | None,
        typer.Option("--lossy", metavar="STEP", help="Round differences to steps of this size; exact without it."),
    ] = None,
    relative: Annotated[
        bool, typer.Option("--relative", help="STEP is a share of the spread of a model's differences.")
    ] = False,
    carry: Annotated[
        bool, typer.Option("--carry", help="Round so that sums over inputs stay: closer outputs behind ReLUs.")
    ] = False,
    max_difference: Annotated[
        float | None,
        typer.Option(
            "--max-difference",
            metavar="SHARE",
            help="Find the largest step that changes no output by more than this share of the largest; random inputs.",
        ),
    ] = None,
    depth: Annotated[int, typer.Option("--depth", help="Most differences in a chain.")] = 8,
    model: Annotated[
        str | None, typer.Option("--model", metavar="SPEC", help="What computes outputs, where the zoo cannot tell.")
    ] = None,
    example: Shapes = None,
    as_json: Json = False,
) -> None:
    """Keep models as aligned differences to their relatives: exact to the bit, or in steps."""
    from weightfold.errors import ConfigError
    from weightfold.zoo.pack import pack as packed
    from weightfold.zoo.store import Zoo

    if relative and lossy is None:
        raise ConfigError("--relative says what the step of --lossy is a share of.", remedy="Add --lossy STEP.")
    with Zoo.open(zoo, create=False) as opened, show.progress("packing", quiet=as_json) as update:
        already = len({c.digest for c in opened.cards() if c.base is not None and (not models or c.name in models)})
        how = _lossy(opened, lossy, relative, carry, max_difference, model, example)
        done = packed(opened, lossy=how, models=models or (), depth=depth, plan=plan, progress=update)
    if as_json:
        show.print_json(
            {"before": done.before, "after": done.after, "plan": plan, "rows": [vars(r) for r in done.rows]}
        )
        return
    _print(done, plan, already)


def _lossy(
    zoo: Zoo,
    step: float | None,
    relative: bool,
    carry: bool,
    bound: float | None,
    model: str | None,
    example: list[str] | None,
) -> Lossy | None:
    """What the options say about rounding."""
    from weightfold.zoo.delta.steps import Lossy

    if bound is None:
        return None if step is None else Lossy(step=step, relative=relative, carry=carry)
    return Lossy(step=step, relative=relative, change=_change(zoo, model, example), within=bound, carry=carry)


def _change(zoo: Zoo, model: str | None, example: list[str] | None) -> Any:
    """Measures the change of outputs on random inputs, by the model that is named or that the zoo knows."""
    import tempfile

    import torch

    from weightfold.artifact.format import read_structure
    from weightfold.cli.inputs import open_with_example
    from weightfold.errors import ConfigError, WeightfoldError
    from weightfold.export.example import zeros
    from weightfold.export.saved import load
    from weightfold.graph.trace import arguments
    from weightfold.zoo.delta.steps import by_outputs, random_inputs

    generator = torch.Generator().manual_seed(0)
    if model is not None:
        net, given = open_with_example(model, example, None, None)
        return by_outputs(net, random_inputs(arguments(given)[0], generator))
    for card in zoo.cards():
        with tempfile.TemporaryDirectory() as folder:
            try:
                file = zoo.get(card.name, Path(folder, "model.safetensors"))
                structure, _ = read_structure(file)
                net = load(file)
            except WeightfoldError:
                continue
        if structure.inputs:
            return by_outputs(net, random_inputs(arguments(zeros(structure.inputs))[0], generator))
    raise ConfigError(
        "No model of this zoo says how its outputs are computed.",
        remedy="Name what the tensors belong to, --model SPEC --example SHAPE, or a step, --lossy STEP.",
    )


def _print(done: Packed, plan: bool, already: int) -> None:
    rows = [_cells(row) for row in done.rows[:N_SHOWN]]
    if rows:
        columns = ("model", "difference to", "before", "after", "how", "change", "note")
        empty = [at for at in (5, 6) if all(row[at] in ("", "–") for row in rows)]
        kept = [at for at in range(len(columns)) if at not in empty]
        right = [new for new, at in enumerate(kept) if at in (2, 3, 5)]
        note = kept.index(6) if 6 in kept else None
        show.table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows], right=right, gives=note)
    more = f", {len(done.rows) - N_SHOWN:,} more than shown" if len(done.rows) > N_SHOWN else ""
    word = "[yellow]would pack[/]" if plan else "[green]packed[/]"
    left = f"; {already:,} packed before {'stays as it is' if already == 1 else 'stay as they are'}" if already else ""
    share = f"{done.after / done.before:.0%}" if done.before else "–"
    show.console().print(
        f"{word}  {done.n_packed:,} of {len(done.rows):,} models as differences{left}{more}; "
        f"all blobs {size(done.before)} -> {size(done.after)} ({share})",
        soft_wrap=True,
    )


def _cells(row: Row) -> list[str]:
    how = "–" if row.parent is None else "exact" if row.step is None else f"steps of {row.step:.3g}"
    return [
        show.plain(row.name),
        "–" if row.parent is None else show.plain(row.parent),
        size(row.before),
        size(row.after),
        how + (", moved" if row.moved else ""),
        "–" if row.change is None else f"{row.change:.2g}",
        show.plain(row.note),
    ]
