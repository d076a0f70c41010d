"""Second moments at the readers. Expected numbers: numpy in float64, on the inputs captured by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import weightfold as wf
from weightfold.errors import DataError, GraphError
from weightfold.graph.apply import apply
from weightfold.graph.edit import remove
from weightfold.graph.observe import Observer, SecondMoment, gather


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def convnet() -> Iterator[nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, groups=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 3),
        )


def reference(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return samples.mean(0), samples.T @ samples / len(samples)


def test_moments_of_conv_grouped_conv_and_flattened_readers(convnet: nn.Sequential) -> None:
    convnet.eval()
    x = draw(5, 2, 6, 6)
    graph = wf.trace(convnet, x)
    with Observer(convnet, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        convnet(x[:2])
        convnet(x[2:])
    found = observer.statistics()
    with torch.no_grad():
        a = convnet[:3](x).double().numpy()
        b = convnet[:5](x).double().numpy()
    for key, samples in {
        ("3.weight", 1): a.transpose(0, 2, 3, 1).reshape(-1, 6),
        ("6.weight", 1): b.transpose(0, 2, 3, 1).reshape(-1, 4),
    }.items():
        mean, second = reference(samples)
        moment = found[key]
        assert moment.count == len(samples)
        np.testing.assert_allclose(moment.mean_C.numpy(), mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(moment.second().numpy(), second, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(moment.covariance().numpy(), np.cov(samples.T, bias=True), rtol=1e-4, atol=1e-6)


def test_moments_in_the_order_of_a_group(convnet: nn.Sequential) -> None:
    graph = wf.trace(convnet, torch.zeros(1, 2, 6, 6))
    with Observer(convnet, graph) as observer:
        convnet(draw(5, 2, 6, 6))
    group = graph["0"]
    axis = group.axis("3.weight", 1)
    own = observer.statistics()["3.weight", 1].of(axis)
    full = observer.statistics()["3.weight", 1]
    order = axis.index[:, 0]
    assert torch.equal(own.second(), full.second()[order][:, order])


def test_statistics_of_an_older_graph_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = wf.trace(net, torch.zeros(1, 3))
    after, _ = apply(net, graph, remove(graph["0"], torch.tensor([1, 2, 5])))
    with Observer(net, after) as observer:
        net(draw(10, 3))
    with pytest.raises(GraphError, match="other channels"):
        observer.statistics()["2.weight", 1].of(graph["0"].axis("2.weight", 1))


class Halves(nn.Module):
    """Two writers side by side, one reader of both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.reader = nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.cat([self.left(x).relu(), self.right(x).tanh()], 1))


def test_groups_that_share_an_axis_share_its_moment() -> None:
    net = Halves()
    x = draw(50, 3)
    graph = wf.trace(net, x)
    with Observer(net, graph) as observer:
        net(x)
    moment = observer.statistics()["reader.weight", 1]
    assert moment.n_channels == 9
    right = moment.of(graph["right"].axis("reader.weight", 1))
    _, second = reference(net.right(x).tanh().detach().double().numpy())
    np.testing.assert_allclose(right.second().numpy(), second, rtol=1e-5, atol=1e-7)


def test_observing_changes_nothing(convnet: nn.Sequential) -> None:
    x = draw(5, 2, 6, 6)
    graph = wf.trace(convnet, x)
    state = {name: value.clone() for name, value in convnet.state_dict().items()}
    results = []
    for watched in (False, True):
        convnet.load_state_dict(state)
        convnet.train().zero_grad()
        torch.manual_seed(3)
        observer = Observer(convnet, graph)
        if watched:
            with observer:
                out = convnet(x)
        else:
            out = convnet(x)
        out.square().sum().backward()
        results.append([out, torch.rand(1), *(p.grad for p in convnet.parameters()), *convnet.buffers()])
        results[-1] = [value.detach().clone() for value in results[-1]]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(module._forward_pre_hooks for module in convnet.modules())


def test_hooks_go_when_the_model_fails(convnet: nn.Sequential) -> None:
    graph = wf.trace(convnet, torch.zeros(1, 2, 6, 6))
    with pytest.raises(RuntimeError), Observer(convnet, graph):
        convnet(torch.zeros(1, 3, 6, 6))
    assert not any(module._forward_pre_hooks for module in convnet.modules())


def test_low_precision_is_summed_in_float32() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = draw(4000, 4)
    with torch.no_grad():
        net[0].weight.copy_(draw(8, 4, seed=1))
    observer = Observer(net, wf.trace(net, x))
    seen: list[Tensor] = []
    handle = net[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with observer, torch.autocast("cpu", torch.bfloat16):
        net(x)
    handle.remove()
    assert seen[0].dtype == torch.bfloat16
    _, second = reference(seen[0].double().numpy())
    np.testing.assert_allclose(observer.statistics()["2.weight", 1].second().numpy(), second, rtol=1e-4, atol=1e-6)


def test_samples_are_thinned_evenly_and_the_same_each_time() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = draw(8, 1, 16, 16)
    graph = wf.trace(net, x)
    moments = []
    for _ in range(2):
        with Observer(net, graph, max_samples_per_batch=300) as observer:
            net(x)
        moments.append(observer.statistics()["2.weight", 1])
    with Observer(net, graph, max_samples_per_batch=None) as observer:
        net(x)
    full = observer.statistics()["2.weight", 1]
    assert 200 <= moments[0].count <= 300
    assert torch.equal(moments[0].second(), moments[1].second())
    torch.testing.assert_close(moments[0].second(), full.second(), rtol=0.3, atol=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_name_the_module(bad: float) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with Observer(net, wf.trace(net, torch.zeros(1, 4))) as observer:
        net(torch.full((3, 4), bad))
    with pytest.raises(DataError, match="input of '2' is not finite"):
        observer.statistics()


def test_only_the_named_groups_are_watched() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    graph = wf.trace(net, torch.zeros(1, 4))
    with Observer(net, graph, ["2"]) as observer:
        net(draw(20, 4))
    assert list(observer.statistics()) == [("4.weight", 1)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 1000))
def test_moments_of_parts_merge_into_the_moment_of_all(sizes: list[int], seed: int) -> None:
    parts = [draw(n, 3, seed=seed + k).double() * 10**k + 5 for k, n in enumerate(sizes)]
    merged = SecondMoment.of_samples(parts[0])
    for part in parts[1:]:
        merged = merged.merge(SecondMoment.of_samples(part))
    mean, second = reference(torch.cat(parts).numpy())
    assert merged.count == sum(sizes)
    np.testing.assert_allclose(merged.mean_C.numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(merged.second().numpy(), second, rtol=1e-9)
    back = SecondMoment.from_state(merged.to_state())
    assert back.count == merged.count
    assert torch.equal(back.second(), merged.second())


def test_a_row_of_numbers_per_channel() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    graph = wf.trace(net, torch.zeros(1, 2))
    rows = gather(net, graph["0"])
    assert torch.equal(rows.float(), torch.cat([net[0].weight, net[0].bias[:, None]], 1))
    assert torch.equal(gather(net, graph["0"], ("read",)).float(), net[2].weight.T)
