"""A batch of any kind is run, and the network is as it was afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from weightfold.stats.norms import recalibrate_
from weightfold.stats.running import call, evaluating, inputs_of, probing


class Two(nn.Module):
    """Two inputs, the second of which may be left out."""

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return x if z is None else x + z


class Dictionary(nn.Module):
    """One input, by keyword only."""

    def forward(self, *, x: Tensor) -> Tensor:
        return x


x, z, y = torch.randn(4, 3), torch.randn(4, 3), torch.arange(4)
ONE = {
    "a tensor": x,
    "a tuple of one": (x,),
    "a list of one": [x],
    "inputs and targets": (x, y),
    "a list of inputs and targets": [x, y],
    "arguments of both kinds": ((x,), {}),
    "a dict": {"x": x},
    "a dict with targets": {"x": x, "y": y},
    "inputs in a tuple, and targets": ((x,), y),
    "inputs in a dict, and targets": ({"x": x}, y),
}
TWO = {
    "a tuple": (x, z),
    "a list": [x, z],
    "inputs and targets": (x, z, y),
    "inputs in a tuple, and targets": ((x, z), y),
    "inputs in a list, and targets": [[x, z], y],
    "a dict": {"x": x, "z": z},
    "a dict with targets": {"x": x, "z": z, "labels": y},
    "inputs in a dict, and targets": ({"x": x, "z": z}, y),
    "arguments of both kinds": ((x,), {"z": z}),
}


@pytest.mark.parametrize("kind", ONE)
@pytest.mark.parametrize("example", [x, {"x": x}, (x,), [x], ((x,), {})])
def test_a_batch_of_one_input(kind: str, example: Any) -> None:
    assert torch.equal(call(Two(), ONE[kind], example), x)


@pytest.mark.parametrize("kind", TWO)
@pytest.mark.parametrize("example", [(x, z), {"x": x, "z": z}, [x, z], ((x,), {"z": z})])
def test_a_batch_of_two_inputs(kind: str, example: Any) -> None:
    assert torch.equal(call(Two(), TWO[kind], example), x + z)


@pytest.mark.parametrize("kind", [kind for kind in TWO if not kind.endswith(", and targets")])
def test_without_an_example_the_forward_says_how_many(kind: str) -> None:
    assert torch.equal(call(Two(), TWO[kind]), x + z)


@pytest.mark.parametrize("kind", ["a dict", "a dict with targets", "inputs in a dict, and targets"])
def test_inputs_by_keyword_only(kind: str) -> None:
    assert torch.equal(call(Dictionary(), ONE[kind]), x)


def test_what_a_data_loader_gives() -> None:
    layer = nn.Linear(3, 2)
    [batch] = DataLoader(TensorDataset(x, y), batch_size=4)
    assert torch.equal(call(layer, batch), layer(x))
    [batch] = DataLoader([{"input": row, "label": label} for row, label in zip(x, y, strict=True)], batch_size=4)
    assert torch.equal(call(layer, batch), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_forward_that_takes_anything_gets_everything() -> None:
    class Any_(nn.Module):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> int:
            return len(args) + len(kwargs)

    assert call(Any_(), (x, z, y)) == 3
    assert call(Any_(), {"a": x, "b": y}) == 2
    assert len(inputs_of(torch.jit.script(nn.Linear(3, 2)), (x,))[0]) == 1


# modes, buffers, random state -----------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Writes into one buffer, replaces another, and draws a random number at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Tensor
        self.last: Tensor
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.tied = nn.Module()
        self.tied.register_buffer("count", self.count)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = x.mean(0)
        assert self.tied.count is self.count
        return x + torch.rand(()) * 0


class Merging(nn.Linear):
    """Merges its weights in evaluation mode, as low-rank adapters do, and takes them apart for training."""

    merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged == mode:
            with torch.no_grad():
                self.weight *= 0.5 if mode else 2.0
            self.merged = not mode
        return super().train(mode)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), Counting(), Merging(3, 2))
    net[1].eval()
    return net


def state(net: nn.Module) -> list[Any]:
    modes = [m.training for m in net.modules()]
    buffers = [(id(b), b._version, b.tolist()) for b in net.buffers()]
    return [modes, buffers, [p.tolist() for p in net.parameters()], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("mode", [evaluating, probing])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [x, torch.randn(4, 5), torch.full((4, 3), torch.nan)])
def test_everything_is_as_it_was_also_after_an_exception(mode: Any, training: bool, batch: Tensor) -> None:
    net = network() if training else network().eval()
    before = state(net)
    try:
        with mode(net):
            assert not net[2].training
            net(batch)
    except RuntimeError:
        assert batch.shape[1] == 5
    assert state(net) == before


def test_probing_normalises_by_the_batch_and_leaves_frozen_norms_alone() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[1].eval()
    with probing(net):
        assert [m.training for m in net] == [True, False]
        assert not torch.is_grad_enabled()
        expected = (x - x.mean(0)) / (x.var(0, correction=0) + net[0].eps).sqrt() / (1 + net[1].eps) ** 0.5
        torch.testing.assert_close(net(x), expected)
    assert torch.equal(net[0].running_mean, torch.zeros(3))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_lazy_and_scripted_modules_are_let_be() -> None:
    net = nn.Sequential(nn.LazyBatchNorm1d(), torch.jit.script(nn.BatchNorm1d(3)))
    with evaluating(net):
        assert torch.equal(net[1](x), x / (1 + 1e-5) ** 0.5)


# batch norms anew -----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_batches() -> None:
    """Reference: plain means over batches, unbiased variances, computed by hand."""
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3)).train()
    batches = [x, z]
    assert recalibrate_(net, iter([(b, y) for b in batches])) == 1
    torch.testing.assert_close(net[1].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert net[0].training
    assert net[1].momentum == 0.1


def test_without_batches_or_with_a_bad_one_statistics_stay() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3))
    net(x)
    before = [b.clone() for b in net.buffers()]
    assert recalibrate_(net, []) == 0
    with pytest.raises(RuntimeError):
        recalibrate_(net, [z, torch.randn(4, 5)])
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert (net[0].momentum, net[0].training, type(net[0])) == (0.1, True, nn.BatchNorm1d)
