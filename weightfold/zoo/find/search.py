"""Find models of a zoo: like another one, by conditions on what is known of them, by the classes they tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightfold.errors import ArtifactError, ConfigError
from weightfold.zoo.card import Card
from weightfold.zoo.find.embed import DIM, Vectors, embedding
from weightfold.zoo.find.index import EXACT, Index
from weightfold.zoo.find.where import condition

if TYPE_CHECKING:
    from weightfold.zoo.store import Zoo

INDEX = "index.npz"
CLASSES = ("classes", "labels")
"""Facts that name the classes a model tells apart."""


@dataclass(frozen=True)
class Hit:
    """A model that was found, and its distance from the one asked for; None where none was."""

    card: Card
    distance: float | None


def search(
    zoo: Zoo,
    *,
    like: Vectors | None = None,
    where: str | None = None,
    classes: Sequence[str] = (),
    k: int = 10,
    exact: int = EXACT,
) -> list[Hit]:
    """Find models.

    Args:
        like: an embedding; the nearest come first. Without it models come in the order they were added.
        where: see `weightfold.zoo.find.where`.
        classes: what the facts `classes` or `labels` must hold, all of them.
        k: most models to return.
        exact: models up to which every embedding is looked at; beyond, an index is kept beside the catalogue.
    Raises:
        ConfigError: the condition cannot be read, or k is below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1. Got {k} instead.")
    if like is None or where is not None or classes or len(zoo) <= exact:
        holds = condition(where) if where is not None else None
        cards = [c for c in zoo.cards() if (holds is None or holds(known(c))) and _tells(c, classes)]
        return [Hit(card, None) for card in cards[:k]] if like is None else _nearest(cards, like, k)
    found = index_of(zoo, exact).search(like, k)
    return [Hit(zoo.card(name), distance) for name, distance in found]


def vector_of(zoo: Zoo, ref: str) -> Vectors:
    """The embedding of a model of the zoo, or of a file of weights, which is embedded as it stands or as it says.

    A name of the zoo comes before a file or folder that is called the same.

    Raises:
        ConfigError: there is no such model, or it has no embedding.
        ArtifactError: the file cannot be read.
    """
    try:
        card = zoo.card(ref)
    except ConfigError:
        if not Path(ref).exists():
            raise
        from weightfold.zoo.exchange.describe import Tracer
        from weightfold.zoo.exchange.imports import read_model

        item = read_model(Path(ref))
        return embedding(item.state, Tracer().trace(item).found)
    if card.embedding is None:
        raise ConfigError(f"'{ref}' has no embedding.", remedy="Add it to the zoo again.")
    return card.embedding


def known(card: Card) -> dict[str, Any]:
    """All that is known of a model, by name: facts, and fields of the card, which come first; `facts.x` is a fact too.

    Example:
        >>> card = Card(name="a", digest="0" * 64, signature="1" * 16, n_parameters=3, dtype="float32", size_bytes=12,
        ...             decoded="0" * 64, stored_bytes=84, added="2026-11-21", facts={"accuracy": 0.9, "name": "b"})
        >>> known(card)["accuracy"], known(card)["name"], known(card)["facts"]["name"]
        (0.9, 'a', 'b')
    """
    return {**card.facts, **card.model_dump(mode="json")}


def _tells(card: Card, classes: Sequence[str]) -> bool:
    held = next((card.facts[name] for name in CLASSES if isinstance(card.facts.get(name), list)), None)
    return not classes or (held is not None and set(classes) <= {str(c) for c in held})


def _nearest(cards: Sequence[Card], like: Vectors, k: int) -> list[Hit]:
    cards = [card for card in cards if card.embedding is not None and card.embedding.shape == like.shape]
    if not cards:
        return []
    table = np.stack([card.embedding for card in cards])  # type: ignore[misc]
    far = np.linalg.norm(table - like, axis=1)
    return [Hit(cards[i], float(far[i])) for i in np.argsort(far, kind="stable")[:k]]


def index_of(zoo: Zoo, exact: int = EXACT) -> Index:
    """The index beside a zoo's catalogue, brought up to date with it; built anew where it is missing or damaged."""
    path = Path(zoo.folder) / INDEX
    try:
        index = Index.load(path)
        before = set(index.names())
        if index.dim != DIM or index.exact != exact:
            raise FileNotFoundError
    except (FileNotFoundError, ArtifactError):
        index, before = Index(DIM, exact=exact), set()
    vectors = {c.name: c.embedding for c in zoo.cards() if c.embedding is not None and c.embedding.shape == (DIM,)}
    gone = [name for name in before if name not in vectors or not np.array_equal(index.vector(name), vectors[name])]
    index.remove(gone)
    new = [name for name in vectors if name not in index]
    if new:
        index.add(new, np.stack([vectors[name] for name in new]))
    if new or gone:
        index.save(path)
    return index
