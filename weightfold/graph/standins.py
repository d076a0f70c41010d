"""What torch's own layers decide by data, in a form that can be traced: packed sequences, causal masks.

How many steps a packed batch has at each time depends on the lengths, which are data; so the tracer cannot follow the
operators that pack. What they do to channels does not depend on the lengths: each is replaced by one that packs the
whole padded batch, as if no sequence ended early. Only shapes over batch and time differ from the true ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True, eq=False)
class _Batch:
    """A packed batch of ``n`` sequences of ``length`` steps; ``lengths`` are the user's own."""

    sizes: Tensor
    n: int
    length: int
    lengths: Tensor


class PackedAsPadded(TorchFunctionMode):
    """Inside, `pack_padded_sequence` and what follows it treat all sequences of a batch as equally long."""

    def __init__(self) -> None:
        super().__init__()
        self._batches: dict[int, _Batch] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "_pack_padded_sequence":
            return self._pack(*args, **(kwargs or {}))
        batch = next((b for a in args[:2] if (b := self._batches.get(id(a))) is not None), None)
        if batch is not None:
            if name == "__getitem__" and isinstance(args[1], int):
                return batch.n
            if name == "_pad_packed_sequence":
                return self._pad(args[0], batch, *args[2:], **(kwargs or {}))
            if name in RECURRENT:
                return self._run(func, args[0], batch, *args[2:])
        return func(*args, **(kwargs or {}))

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1) if batch_first else x
        known = getattr(lengths, "constant", None)
        length = x.shape[0] if known is None else int(known.max())
        x = x if length == x.shape[0] else x[:length]
        sizes = torch.full((length,), x.shape[1], dtype=torch.long, device="cpu")
        self._batches[id(sizes)] = _Batch(sizes, x.shape[1], length, lengths)
        return x.reshape(-1, *x.shape[2:]), sizes

    def _pad(self, data: Tensor, batch: _Batch, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
        x = data.reshape(batch.length, batch.n, *data.shape[1:])
        if total > batch.length:
            x = torch.cat([x, x.new_full((total - batch.length, *x.shape[1:]), value)])
        if value:
            ended = torch.zeros(*x.shape[:2], *(1,) * (x.ndim - 2), dtype=torch.bool, device=x.device)
            x = x.masked_fill(ended, value)
        return x.transpose(0, 1) if batch_first else x, batch.lengths

    def _run(self, func: Any, data: Tensor, batch: _Batch, *rest: Any) -> Any:
        output, *states = func(data.reshape(batch.length, batch.n, *data.shape[1:]), *rest, False)
        return output.reshape(-1, *output.shape[2:]), *states


@contextmanager
def traceable() -> Iterator[None]:
    """Put what torch's own layers decide by data out of the tracer's way.

    Whether a mask happens to be causal only chooses the kernel: the result is the same.
    """

    def hinted(_: Tensor | None, is_causal: bool | None = None, __: int | None = None) -> bool:
        return bool(is_causal)

    before = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = hinted
    try:
        with PackedAsPadded():
            yield
    finally:
        transformer._detect_is_causal_mask = before
