"""From a source to rows and blobs: everything that is worked out before the zoo's files are touched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from weightfold.errors import ConfigError
from weightfold.zoo.exchange.describe import Traced, described, metadata_for, with_architecture
from weightfold.zoo.exchange.imports import Imported
from weightfold.zoo.storage.catalogue import Catalogue, Content, Model
from weightfold.zoo.storage.contents import check_tensors, describe, to_blob
from weightfold.zoo.storage.naming import checked_name, tidy_name


@dataclass(frozen=True, eq=False)
class Wanted:
    """How one model is to be entered.

    Args:
        name: as the user chose it, or None.
        facts: as the user gave them; they come before those of the source.
        parent: what it is said to come from.
    """

    name: str | None = None
    facts: Mapping[str, Any] | None = None
    parent: str | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """A model that is ready to be written.

    Args:
        blob: its tensors in full.
        extras: metadata and texts that lay beside it, as JSON, if there were any.
        traced: what is known of its architecture.
    """

    item: Imported
    wanted: Wanted
    traced: Traced
    semantic_hash: str | None
    reason: str | None
    embedding: bytes | None
    blob: bytes
    extras: bytes | None


def check(item: Imported, wish: Wanted) -> None:
    """Make sure that a model can be stored as it is wanted.

    Raises:
        ConfigError: the name is not allowed, or facts are no JSON.
        ArtifactError: a tensor cannot be stored; names it.
    """
    if wish.name is not None:
        checked_name(wish.name)
    _check_facts({**item.facts, **(wish.facts or {})})
    check_tensors(item.state)


def records(items: Sequence[Imported], wanted: Sequence[Wanted], traced: Sequence[Traced]) -> list[Record]:
    """Work out what is written of models (see `check`): hashes and embeddings of those of one architecture together."""
    return [
        Record(with_architecture(item, known), wish, known, *told, to_blob(item.state), _extras(item, known))
        for item, wish, known, told in zip(items, wanted, traced, described(items, traced), strict=True)
    ]


def content_of(record: Record, blob: str) -> Content:
    """The row of a content that is stored in full."""
    facts = describe(record.item.state)
    return Content(record.item.digest, blob, len(record.blob), None, record.item.digest, **facts)


def model_of(record: Record, name: str, extras: str | None, symmetries: str | None) -> Model:
    """The row of a model."""
    item, wish = record.item, record.wanted
    body = {
        "architecture": item.architecture,
        "hash_reason": record.reason,
        "parent": wish.parent or item.parent,
        "facts": {**item.facts, **(wish.facts or {})},
        "source": item.source,
        "added": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Model(name, item.digest, record.semantic_hash, record.embedding, extras, symmetries, body)


def free_name(catalogue: Catalogue, record: Record) -> tuple[str, bool]:
    """The name to enter a model under, and whether it stands there already with this content.

    A name that the user did not choose gives way: the digest's first digits are put behind it.

    Raises:
        ConfigError: the name that the user chose belongs to another content.
    """
    wish, digest = record.wanted.name, record.item.digest
    plain = wish or tidy_name(record.item.name)
    for name in (plain, *(f"{plain}-{digest[:n]}" for n in (8, 16, 64))):
        held = catalogue.digest_of(name)
        if held is None or held == digest:
            return name, held is not None
        if wish is not None:
            break
    raise ConfigError(
        f"The zoo holds another model named '{plain}' (content {str(catalogue.digest_of(plain))[:12]}; this one is "
        f"{digest[:12]}).",
        remedy="Choose another name with --name, or remove the other one first.",
    )


def _check_facts(facts: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(facts), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The facts {dict(facts)!r} cannot be kept as JSON: {error}.") from None


def _extras(item: Imported, traced: Traced) -> bytes | None:
    extras = {"metadata": metadata_for(item, traced), "files": dict(item.files)}
    if not extras["metadata"] and not extras["files"]:
        return None
    return json.dumps(extras, ensure_ascii=False, sort_keys=True).encode()
