"""The part of a report on a self-compressed network: its file, its layers, the picture of their bits."""

from __future__ import annotations

from html import escape
from typing import Any

from weightfold.report.bits import bits_picture, percent
from weightfold.report.facts import Facts


def packed_of(facts: Facts) -> dict[str, Any] | None:
    """What the results say of the packed file; None for other runs."""
    return facts.results["arms"].get("folded", {}).get("packed")


def lead_of_file(facts: Facts) -> str:
    """Begin the first sentence of such a report."""
    packed, arm = packed_of(facts), facts.results["arms"]["folded"]
    assert packed is not None
    aim = packed["target_bytes"]
    asked = "" if aim is None else f" (asked for: {aim:,})"
    live, full = arm["weights"][1], arm["weights"][0]
    return (
        f"The compressed network takes <strong>{packed['coded_bytes']:,} bytes</strong> as a file{asked}: "
        f"<strong>{percent(packed['share'])}</strong> of the {packed['fp32_bytes']:,} of the float one, with {live:,} "
        f"of {full:,} weights left"
    )


def bits(facts: Facts) -> str:
    """Bits by layer over the run, and what each layer takes in the end."""
    packed = packed_of(facts)
    if packed is None or facts.bits is None:
        return ""
    note = (
        "Each row is a layer over the steps of training. Left: bits of a weight, the mean over the output channels "
        "that live. Right: the share of its weights that are not zero. Below: the file, measured by its own coder."
    )
    picture = (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Bits by layer over the run">'
        f'<div class="wide">{bits_picture(facts.bits)}</div></div>'
    )
    return (
        f'<section><h2>Bits by layer</h2><p class="note">{note}</p>{picture}{_table(facts, packed)}'
        f"{_front(facts)}</section>"
    )


def _table(facts: Facts, packed: dict[str, Any]) -> str:
    layers = facts.results["arms"]["folded"]["layers"]
    head = (
        '<tr><th>Layer</th><th class="n">Channels</th><th class="n">Weights left</th><th class="n">Bits</th>'
        '<th class="n">Bytes in the file</th></tr>'
    )
    rows = "".join(_layer(layer, packed["by_tensor"][layer["name"]]) for layer in layers)
    rest = packed["coded_bytes"] - sum(packed["by_tensor"][layer["name"]] for layer in layers)
    note = (
        f"The rest of the file, {rest:,.0f} bytes, are biases, norms, the header ({packed['header_bytes']:,}) and a "
        f"checksum. Without the entropy coder it would take {packed['packed_bytes']:,} bytes. "
        "<code>model.safetensors</code> beside it holds the same values as floats."
    )
    return (
        '<div class="card scroll" style="margin-top:0.8rem" tabindex="0" role="region" aria-label="Layers of the file">'
        f'<table><thead>{head}</thead><tbody>{rows}</tbody></table></div><p class="note" '
        f'style="margin-top:0.7rem">{note}</p>'
    )


def _front(facts: Facts) -> str:
    """The networks that were kept on the way."""
    front = facts.results["arms"]["folded"].get("front")
    if not front:
        return ""
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(row["file"])}</code></th><td class="n">{row["bytes"]:,}</td>'
        f'<td class="n">{row["score"]:.4f}</td><td class="n">{row["step"]:,}</td></tr>'
        for row in front
    )
    head = (
        '<tr><th>Kept on the way</th><th class="n">Bytes</th>'
        f'<th class="n">Test {escape(facts.results["score"])}</th><th class="n">Step</th></tr>'
    )
    return (
        '<div class="card scroll" style="margin-top:0.8rem" tabindex="0" role="region" aria-label="Networks kept">'
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def _layer(layer: dict[str, Any], n_bytes: float) -> str:
    (channels, living), (full, left) = layer["rows"], layer["weights"]
    widths = ", ".join(f"{n} of {bits} bits" for bits, n in layer["bits_by_row"].items())
    return (
        f'<tr><th scope="row"><code>{escape(layer["name"])}</code></th><td class="n">{channels} → {living}</td>'
        f'<td class="n">{full:,} → {left:,} ({percent(left / full)})</td>'
        f'<td class="n" title="{widths}">{layer["bits"]:.1f}</td><td class="n">{n_bytes:,.0f}</td></tr>'
    )
