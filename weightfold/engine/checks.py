"""What is found wrong before a run, or before an event."""

from __future__ import annotations

import torch
from torch import nn

from weightfold.errors import EditError


def check_finite(model: nn.Module) -> None:
    """Refuse weights that nothing can be learned from.

    Raises:
        EditError: names the tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise EditError(
                f"'{name}' holds values that are not finite.",
                remedy="Start from weights of a run that did not diverge.",
            )
