"""Models that were read, kept as long as there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from torch import Tensor

State = Mapping[str, Tensor]
Key = TypeVar("Key", bound=Hashable)
Held = TypeVar("Held", bound=State)


def size_of(state: State) -> int:
    """Bytes of tensors, each tied one counted once."""
    return sum(value.numel() * value.element_size() for value in {id(v): v for v in state.values()}.values())


class Cache(Generic[Key, Held]):
    """Tensors by name under keys; what was not used longest goes first.

    Args:
        room_bytes: what they may take together.
        least: how many are kept whatever they take.
    Example:
        >>> import torch
        >>> cache = Cache(8, least=1)
        >>> one = cache.put("one", {"w": torch.zeros(2)})
        >>> two = cache.put("two", {"w": torch.ones(1)})
        >>> cache.get("one"), cache.get("two") is two
        (None, True)
    """

    def __init__(self, room_bytes: int, *, least: int) -> None:
        self._room_bytes, self._least = room_bytes, least
        self._held: OrderedDict[Key, Held] = OrderedDict()
        self._size_bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def get(self, key: Key) -> Held | None:
        """What is held under a key; None where that went, or never was."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Key, state: Held) -> Held:
        """Hold tensors under a key, in place of what was there; gives them back."""
        if key in self._held:
            self._size_bytes -= size_of(self._held.pop(key))
        self._held[key] = state
        self._size_bytes += size_of(state)
        while len(self._held) > self._least and self._size_bytes > self._room_bytes:
            self._size_bytes -= size_of(self._held.popitem(last=False)[1])
        return state
