"""A file in its runtime, called like the module that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weightfold.errors import ExportError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Slot:
    """An input of a file.

    Args:
        name: as the file calls it.
        shape: sizes; None where any size is taken.
        dtype: of its numbers, as NumPy calls it; "" where it is not known.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = ""

    def takes(self, shape: Sequence[int]) -> bool:
        """Tell whether an input of this shape fits.

        Example:
            >>> Slot("x", (None, 3)).takes((5, 3)), Slot("x", (1, 3)).takes((5, 3))
            (True, False)
        """
        return len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A file that its own runtime has loaded: call it with what the module takes.

    Args:
        path: the file.
        runtime: what runs it, in words, with its version.
        slots: its inputs, in order.
        run: from arrays, in order of the slots, to arrays.

    Example:
        >>> double = Loaded(Path("double.onnx"), "by hand", (Slot("x", (None, 2)),), lambda x: [2 * x[0]])
        >>> double(np.ones((1, 2), np.float32)).tolist()
        [[2.0, 2.0]]
    """

    path: Path
    runtime: str
    slots: tuple[Slot, ...]
    run: Callable[[list[Array]], list[Array]]

    def eval(self) -> Loaded:
        """Itself: a file computes as in evaluation mode."""
        return self

    @property
    def any_batch(self) -> bool:
        """Whether every input's first size is free."""
        return bool(self.slots) and all(slot.shape and slot.shape[0] is None for slot in self.slots if slot.shape)

    def arrays(self, *args: Any, **named: Any) -> list[Array]:
        """Run on arrays or tensors; the outputs as arrays, in order.

        Raises:
            ExportError: an input is missing or has a shape that the file does not take; names it, with both shapes.
        """
        left, values = dict(named), list(args)
        given: list[Array] = []
        for slot in self.slots:
            if slot.name not in left and not values:
                raise ExportError(f"'{self.path}' needs the input '{slot.name}', which is missing.")
            value = _array(left.pop(slot.name) if slot.name in left else values.pop(0), slot.dtype)
            if not slot.takes(value.shape):
                raise ExportError(
                    f"The input '{slot.name}' of '{self.path}' has the shape {_shape(slot.shape)}. "
                    f"Got {tuple(value.shape)} instead.",
                    remedy="A file takes other batch sizes at most: export it with an --example of the sizes you need.",
                )
            given.append(value)
        if values or left:
            raise ExportError(f"'{self.path}' takes {len(self.slots)} inputs. Got {len(args) + len(named)} instead.")
        return self.run(given)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run on tensors or arrays; tensors come back as tensors, alone or as a tuple."""
        outputs: list[Any] = self.arrays(*args, **named)
        if any(type(value).__module__.partition(".")[0] == "torch" for value in (*args, *named.values())):
            import torch

            outputs = [torch.from_numpy(np.array(value)) for value in outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _array(value: Any, dtype: str) -> Array:
    """An input as an array; halves, as a module in half precision takes them, become singles where the file has these.

    Example:
        >>> _array(np.ones(2, np.float16), "float32").dtype, _array(np.ones(2, np.int64), "float32").dtype
        (dtype('float32'), dtype('int64'))
    """
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    found = np.asarray(value)
    return found.astype(np.float32) if found.dtype == np.float16 and dtype == "float32" else found


def _shape(sizes: Sequence[int | None]) -> str:
    """Write a shape with N for a free size.

    Example:
        >>> _shape((None, 3))
        '(N, 3)'
    """
    return f"({', '.join('N' if size is None else str(size) for size in sizes)}{',' if len(sizes) == 1 else ''})"
