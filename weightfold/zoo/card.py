"""What is known of one model of a zoo, as plain data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from weightfold.config import Config


class Card(Config):
    """One model of a zoo.

    Example:
        >>> card = Card(name="a", digest="0" * 64, signature="1" * 16, n_parameters=3, dtype="float32", size_bytes=12,
        ...             decoded="0" * 64, stored_bytes=84, added="2026-11-21T00:00:00+00:00")
        >>> card.is_full, card.lossy, card.embedding is None
        (True, False, True)
    """

    name: str
    """unique in its zoo"""
    digest: str
    """of the content: `weightfold.fingerprint.digest` of all tensors as they were added"""
    architecture: str | None = None
    """built-in name, function, class, or what a configuration calls it; None where only tensors are known"""
    signature: str
    """16 hex digits of the names, types and shapes of all tensors"""
    n_parameters: int
    """numbers in all tensors, each tied tensor once"""
    dtype: str
    """the type of most of them"""
    size_bytes: int
    """of the tensors"""
    semantic_hash: str | None = None
    """see `weightfold.weights.canon`; compare with `same_hash`"""
    hash_reason: str | None = None
    """why there is no semantic hash"""
    parent: str | None = None
    """what the model is said to come from: a name or digest of this zoo, or a name elsewhere"""
    facts: dict[str, Any] = Field(default_factory=dict)
    """accuracy, data, license, tags: free JSON"""
    source: str | None = None
    """the file or folder that it was added from"""
    added: str
    """ISO 8601, UTC"""
    base: str | None = None
    """digest of the content whose difference is stored; None: stored in full"""
    decoded: str
    """digest of what reading gives: that of the content, unless it was packed lossily"""
    stored_bytes: int
    """of the blob"""
    vector: bytes | None = Field(default=None, repr=False, exclude=True)
    """the embedding's bytes, float32"""

    @property
    def is_full(self) -> bool:
        """Whether the tensors are stored as they are, not as a difference."""
        return self.base is None

    @property
    def lossy(self) -> bool:
        """Whether reading gives other numbers than were added."""
        return self.decoded != self.digest

    @property
    def embedding(self) -> npt.NDArray[np.float32] | None:
        """Place of the model among all models, shape (256,), float32; see `weightfold.zoo.find.embed`."""
        return None if self.vector is None else np.frombuffer(self.vector, np.float32)

    @property
    def hash_keys(self) -> tuple[str, str, str] | None:
        """Keys of which models of the same function share at least one; see `weightfold.weights.canon.hash_keys`."""
        if self.semantic_hash is None:
            return None
        from weightfold.weights.canon import hash_keys

        return hash_keys(self.semantic_hash)
