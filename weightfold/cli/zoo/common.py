"""What the verbs of `weightfold zoo` share: their arguments, and how facts and models are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from weightfold.zoo.card import Card

Folder = Annotated[Path, typer.Argument(metavar="ZOO", help="Folder of the zoo.")]
Ref = Annotated[str, typer.Argument(metavar="MODEL", help="Name of a model, or the first digits of its digest.")]
HASH_DIGITS = 12


def parse_facts(texts: list[str] | None) -> dict[str, Any]:
    """Read facts that were written as KEY=VALUE; a value that is JSON counts as such.

    Raises:
        ConfigError: one has another form.
    Example:
        >>> parse_facts(["accuracy=0.97", "data=mnist", 'tags=["a", "b"]'])
        {'accuracy': 0.97, 'data': 'mnist', 'tags': ['a', 'b']}
    """
    from weightfold.errors import ConfigError

    facts: dict[str, Any] = {}
    for text in texts or []:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"'{text}' is no fact.", remedy="Write KEY=VALUE, as in --fact accuracy=0.97.")
        try:
            facts[key.strip()] = json.loads(value, parse_constant=str)
        except ValueError:
            facts[key.strip()] = value
    return facts


def plain_card(card: Card) -> dict[str, Any]:
    """A card as plain data, for JSON."""
    return {**card.model_dump(mode="json"), "has_embedding": card.vector is not None, "lossy": card.lossy}


def size(n_bytes: float) -> str:
    """Write a size for people.

    Example:
        >>> size(812), size(407_080), size(12_345_678_901)
        ('812 B', '407 kB', '12.3 GB')
    """
    for unit, step in (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9)):
        if n_bytes < 999.5 * step or unit == "GB":
            value = n_bytes / step
            return f"{value:.0f} {unit}" if value >= 99.95 or unit == "B" else f"{value:.3g} {unit}"
    raise AssertionError


def facts_text(facts: dict[str, Any], longest: int = 80) -> str:
    """The facts of a card in one line.

    Example:
        >>> facts_text({"accuracy": 0.97, "tags": ["a", "b"]})
        'accuracy 0.97, tags a b'
    """
    parts = [f"{key} {_short(value)}" for key, value in facts.items()]
    text = ", ".join(parts)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return " ".join(f"{k} {_short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
