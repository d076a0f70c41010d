"""What a module reads is seen however it is called, and taps come off whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightfold.stats.taps import tap, tapped


class Reader(nn.Module):
    """Reads h, with a scale before it in the call."""

    def forward(self, scale: float, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return scale * h if mask is None else scale * h * mask


h, mask = torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 0.0, 1.0])
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((2.0, h, mask), {}),
    "the mask by keyword": ((2.0, h), {"mask": mask}),
    "by keyword": ((2.0,), {"h": h, "mask": mask}),
    "by keyword, in another order": ((), {"mask": mask, "h": h, "scale": 2.0}),
}


@pytest.mark.parametrize("kind", CALLS)
def test_it_sees_the_first_tensor_of_the_forward_and_may_replace_it(kind: str) -> None:
    args, kwargs = CALLS[kind]
    module, seen = Reader(), []
    handle = tap(module, seen.append)
    assert torch.equal(module(*args, **kwargs), 2 * h * mask)
    handle.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], h)
    handle = tap(module, lambda x: x + 1)
    assert torch.equal(module(*args, **kwargs), 2 * (h + 1) * mask)
    handle.remove()
    assert torch.equal(module(*args, **kwargs), 2 * h * mask)


def test_a_call_without_a_tensor_is_let_be() -> None:
    class Says(nn.Module):
        def forward(self, word: str) -> str:
            return word

    with tapped(says := Says(), {"": lambda _: None}):
        assert says("yes") == says(word="yes") == "yes"


def test_taps_come_off_after_an_exception_and_when_one_cannot_be_put_on() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(RuntimeError), tapped(net, {"0": lambda _: None, "1": lambda _: None}):
        net(torch.zeros(2, 5))
    with pytest.raises(AttributeError), tapped(net, {"0": lambda _: None, "none": lambda _: None}):
        pass
    assert not any(m._forward_pre_hooks for m in net.modules())
