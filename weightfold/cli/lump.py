"""`weightfold lump`: neurons of a trained network aggregated by approximate differential equivalence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from weightfold.cli import show
from weightfold.cli.door import Json, guarded
from weightfold.cli.inputs import Model, Shapes, Weights


@guarded
def lump(
    model: Model,
    eps: Annotated[
        float | None, typer.Option(help="Tolerance, relative to each layer's scale; 0 merges what is exactly alike.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="SHARE", help="Share of the parameters to keep, such as 50% or 0.5.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="The whole trade-off curve, with a plot; no model.")] = False,
    repair: Annotated[
        int, typer.Option(min=0, metavar="N", help="Solve readers anew on N unlabelled inputs of --data.")
    ] = 0,
    polish: Annotated[
        int | None,
        typer.Option(min=0, help="With --repair: rounds of Gauss-Newton on all weights.", show_default="10 if cheap"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="'digits', a file or a folder; labels are only for scores.")
    ] = None,
    example: Shapes = None,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; without it nothing is written.")] = None,
    box: Annotated[float, typer.Option(help="The bound holds for inputs within plus and minus this.")] = 3.0,
    linkage: Annotated[str, typer.Option(help="'complete' bounds a block by the tolerance, 'single' its gaps.")] = (
        "complete"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of inputs.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over the run in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Lump neurons that do the same, exactly or up to a tolerance, without training; data are optional."""
    from weightfold.errors import ConfigError

    if sum(x is not None for x in (eps, target)) + sweep > 1:
        raise ConfigError("--eps, --target and --sweep are three ways to say how far.", remedy="Give one of them.")
    if repair and data is None:
        raise ConfigError("--repair needs unlabelled inputs.", remedy="Pass --data; its labels are not looked at.")
    from weightfold.training.lumped import LumpRunConfig, lump_to_folder
    from weightfold.training.lumped import sweep as run_sweep

    if eps is None and target is None and not sweep:
        eps = 0.0
    config = LumpRunConfig(
        eps=eps, target=share_of(target), linkage=linkage, repair=repair, polish=polish, box=box, seed=seed
    )
    source, dataset = _opened(model, example, data, weights)
    if sweep:
        _check_free(out, force=force)
        rows = run_sweep(source, config, data=dataset)
        _write_sweep(out, model, rows, force=force)
        show.print_json({"model": model, "rows": rows}) if as_json else print_sweep(rows, out)
        return
    if out is None:
        from weightfold.training.lumped import lump_opened

        run = {"results": lump_opened(source, config, data=dataset)}
    else:
        run = lump_to_folder(source, config, out, data=dataset, force=force)
    if as_json:
        show.print_json({"out": None if out is None else str(out), **run})
        return
    print_run(model, run["results"], config, out)


def share_of(text: str | None) -> float | None:
    """Read a share.

    Example:
        >>> share_of("50%"), share_of("0.25"), share_of(None)
        (0.5, 0.25, None)
    """
    from weightfold.errors import ConfigError

    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ConfigError(f"--target must be a share, such as 50% or 0.5. Got '{text}' instead.") from None


def _opened(model: str, example: list[str] | None, data: str | None, weights: Path | None) -> tuple[Any, Any]:
    from weightfold.data import load
    from weightfold.errors import ConfigError
    from weightfold.export.opened import open_model

    dataset = None if data is None else load(data)
    source = open_model(model, weights=weights, example=example or [], task=None if dataset is None else dataset.task)
    if not source.inputs:
        raise ConfigError(f"Lumping '{model}' needs an example input.", remedy="Pass --example 1x3x32x32, or --data.")
    return source, dataset


def _check_free(out: Path | None, *, force: bool) -> None:
    if out is not None:
        from weightfold.training import folder as files

        files.check(out, force=force)


def _write_sweep(out: Path | None, model: str, rows: list[dict[str, Any]], *, force: bool) -> None:
    if out is None:
        return
    from weightfold.artifact.files import write_bytes, write_json
    from weightfold.errors import ConfigError
    from weightfold.report.curves import Curve, panels
    from weightfold.training import folder as files

    curves = []
    for key, name in (("score", "score"), ("measured", "change of the outputs (rms)"), ("bound", "guaranteed bound")):
        points = [(row["kept"], number) for row in rows if (number := _number(row, key)) is not None]
        if points:
            curves.append((name, [Curve(name, sorted(points))], None))
    pictures = "".join(
        panels(f"{model}: {name}", [(name, own, None)], "share of parameters kept", name) for name, own, _ in curves[:1]
    )
    with files.claimed(out, "lump --sweep", force=force) as left:
        if left is not None:
            raise ConfigError(f"'{out}' holds an interrupted run.", remedy="Choose another --out, or pass --force.")
        files.clear(out)
        write_json(out / "sweep.json", show.finite({"model": model, "rows": rows}))
        write_bytes(out / "sweep.svg", pictures.encode())


def _number(row: dict[str, Any], key: str) -> float | None:
    value = row.get(key)
    return value["rms"] if isinstance(value, dict) else value


def print_sweep(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print one line for each point of the curve."""
    name = "eps" if "eps" in rows[0] else "target"
    cells = [
        [
            f"{row[name]:g}",
            show.quantity(row["kept"], "share"),
            "–" if row["bound"] is None else f"{row['bound']:.4g}",
            "–" if row["measured"] is None else f"{row['measured']['rms']:.4g}",
            show.quantity(row.get("score"), "share"),
        ]
        for row in rows
    ]
    show.table((name, "parameters kept", "bound", "measured (rms)", "score"), cells, right=(0, 1, 2, 3, 4))
    if out is not None:
        show.console().print(f"plot    {out / 'sweep.svg'}\nnumbers {out / 'sweep.json'}")


def print_run(model: str, results: dict[str, Any], config: Any, out: Path | None) -> None:
    """Print what went, what is guaranteed and what was measured."""
    rows = [[show.plain(e["group"]), f"{e['before']:,}", f"{e['after']:,}"] for e in results["events"]]
    for key, name in (("parameters", "parameters"), ("macs", "multiply-accumulates")):
        before, after = results[key]
        rows.append([f"[bold]{name}[/]", f"{before:,}", f"{after:,}  ({100 * after / max(before, 1):.1f} %)"])
    how = f"to {100 * config.target:g} %" if config.target is not None else f"at ε = {config.eps:g}"
    title = f"{model}, lumped {how} in {results['seconds']:.1f} s"
    show.table(("group", "channels before", "after"), rows, right=(1, 2), title=title)
    console = show.console()
    for warning in results["warnings"]:
        console.print(f"[yellow]warning[/]  {show.plain(warning)}")
    if results["kinds"]:
        console.print("merged   " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(results["kinds"].items())))
    if results["bound"] is not None:
        where = f"for every input within ±{config.box:g}"
        console.print(f"bound    no output changes by more than {results['bound']:.4g} {where} (guaranteed)")
    else:
        console.print(f"bound    none: {show.plain(results['no_bound'])}")
    if results.get("measured"):
        found = results["measured"]
        console.print(
            f"measured outputs change by {found['rms']:.4g} (rms), at most {found['max_abs']:.4g}; "
            f"{100 * found['relative']:.2f} % of their size"
        )
    if results.get("scores"):
        before, after = results["scores"]
        console.print(f"{results['score']:8s} {100 * before:.2f} % before, {100 * after:.2f} % after")
    if out is not None:
        console.print(f"\nmodel    {out / 'model.safetensors'}\nledger   {out / 'ledger.db'}")
