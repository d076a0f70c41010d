"""Model cards: what a file is, where it comes from, how large and how good it is, what it may be used for.

Beside `small.onnx` stand `small.onnx.model_card.md` for people and `small.onnx.model_card.json` with the same facts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightfold import __version__
from weightfold.artifact import write_bytes, write_json
from weightfold.artifact.plain import parse_json
from weightfold.errors import ArtifactError
from weightfold.export.check import Exported
from weightfold.export.source import Source
from weightfold.fingerprint import fingerprint
from weightfold.size import file_bytes, parameters, unique_state

FORMAT = 1
UNSPECIFIED = "unspecified"


def run_facts(folder: str | Path) -> dict[str, Any]:
    """What the folder of a run says of its model: method, data, scores, size of the network it came from.

    Returns:
        facts: plain data; empty where the folder holds no finished run.
    Raises:
        ArtifactError: `run.json` is damaged.
    """
    path = Path(folder, "run.json")
    if not path.is_file():
        return {}
    try:
        run = parse_json(path.read_bytes())
        results = run.get("results")
        if results is None:
            return {}
        arms = results["arms"]
        dense, last = arms.get("dense"), arms.get("folded", arms.get("dense"))
        return {
            "method": run["config"].get("method", run["kind"]),
            "data": {key: run["data"].get(key) for key in ("name", "fingerprint", "samples")},
            "data_source": run["config"]["data"],
            "limit": run["config"].get("limit"),
            "score": results["score"],
            "before": None if dense is None else {"value": dense["score"], "parameters": dense["parameters"]},
            "after": {"value": last["score"], "parameters": last["parameters"]},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error!r}", remedy="Start the run anew with --force.") from None


def make_card(
    source: Source,
    exported: Exported,
    *,
    measured: Mapping[str, Any] | None = None,
    license_name: str | None = None,
) -> dict[str, Any]:
    """Gather the facts of a written file.

    Args:
        source: what it was made from; its `facts` are those of `run_facts`.
        exported: the file.
        measured: score of the file itself in its runtime: data, split, samples, score, module, file; None if it was
            not measured.
        license_name: of the model; never guessed.
    """
    facts = source.facts
    beside = [exported.path.with_suffix(".bin")] if exported.path.suffix == ".xml" else []
    shapes = source.before.shapes
    held = unique_state(source.model)
    whole = sum(_elements(shape) for name, shape in shapes.items() if name not in source.before.aliases)
    return {
        "format": FORMAT,
        "name": exported.path.name,
        "target": exported.target,
        "license": license_name or UNSPECIFIED,
        "source": {
            "model": facts.get("spec", source.builder.name),
            "built_by": f"{source.builder.kind} {source.builder.name}",
            "fingerprint": fingerprint(source.model),
            "ledger_head": source.ledger_head,
            "method": facts.get("method"),
            "weightfold": __version__,
        },
        "file": {"bytes": exported.size_bytes, "sha256": _digest(exported.path), "runtime": exported.runtime}
        | ({"beside": {file.name: _digest(file) for file in beside}} if beside else {}),
        "sizes": {
            "parameters": parameters(source.model),
            "bytes": exported.size_bytes,
            "fp32_bytes": file_bytes(held),
            "original_fp32_bytes": 4 * whole,
            "share_of_original": round(exported.size_bytes / max(4 * whole, 1), 6),
            "learned_codes": sorted(source.coded),
        },
        "agreement": {
            "largest_difference": exported.largest_difference,
            "relative_difference": exported.relative_difference,
            "tolerance": exported.tolerance,
            "compared_on": exported.compared_on,
        },
        "accuracy": {
            "score": facts.get("score"),
            "before": facts.get("before"),
            "after": facts.get("after"),
            "measured": dict(measured) if measured else None,
        },
        "data": facts.get("data"),
        "inputs": [item.model_dump(mode="json") for item in source.inputs],
        "any_batch": exported.any_batch,
    }


def write_card(card: Mapping[str, Any], path: Path) -> tuple[Path, Path]:
    """Write a card beside its file.

    Args:
        path: of the model's file.
    Returns:
        paths: of the text and of the JSON.
    """
    text, data = (path.with_name(f"{path.name}.model_card.{ending}") for ending in ("md", "json"))
    write_json(data, dict(card))
    write_bytes(text, as_markdown(card).encode())
    return text, data


def as_markdown(card: Mapping[str, Any]) -> str:
    """Write a card as text."""
    source, sizes, agreement = card["source"], card["sizes"], card["agreement"]
    lines = [
        f"# {card['name']}",
        "",
        "| | |",
        "|---|---|",
        f"| target | {card['target']}, {card['file']['runtime']} |",
        f"| licence | {card['license']} |",
        f"| made from | {source['model']} ({source['built_by']}), by {source['method'] or 'no method of a run'} |",
        f"| ledger head | {source['ledger_head'] or 'none: the model comes from no run'} |",
        f"| fingerprint of the weights | {source['fingerprint']} |",
        f"| sha256 of the file | {card['file']['sha256']} |",
        *(f"| sha256 of {name} | {digest} |" for name, digest in card["file"].get("beside", {}).items()),
        f"| size | {sizes['bytes']:,} bytes, {100 * sizes['share_of_original']:.2f} % of the original in fp32 "
        f"({sizes['original_fp32_bytes']:,} bytes) |",
        f"| parameters | {sizes['parameters']:,} |",
        f"| batches | {'any size' if card['any_batch'] else 'the size of the example only'} |",
        f"| outputs | largest difference to the module {agreement['largest_difference']:.3g}, "
        f"{100 * agreement['relative_difference']:.3g} % of their norm, on {agreement['compared_on']} |",
        "",
        "## Accuracy",
        "",
        *_accuracy(card["accuracy"]),
        "",
        "## Data",
        "",
        *_data(card["data"]),
        "",
    ]
    return "\n".join(lines)


def _accuracy(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if found["before"]:
        lines.append(f"- before: {found['score']} {found['before']['value']:.4f}, the dense network of the run")
    if found["after"]:
        lines.append(f"- after: {found['score']} {found['after']['value']:.4f}, the network of the run")
    if found["measured"]:
        m = found["measured"]
        lines.append(
            f"- this file in its runtime: {m['score']} {m['file']:.4f} on {m['samples']:,} samples of '{m['data']}' "
            f"({m['split']}); the module {m['module']:.4f} on the same"
        )
    return lines or ["Not measured: the model comes from no run, and no data were given."]


def _data(data: Mapping[str, Any] | None) -> list[str]:
    if not data:
        return ["Unknown: the model comes from no run."]
    samples = ", ".join(f"{n:,} {name}" for name, n in (data.get("samples") or {}).items())
    return [f"- {data['name']} ({samples}), fingerprint {data['fingerprint']}"]


def _elements(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            sha.update(part)
    return sha.hexdigest()
