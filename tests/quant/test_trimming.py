"""The last trim: files as small as wanted and hardly smaller, and what goes is what the loss misses least."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weightfold.artifact.coded import CodedTensor
from weightfold.quant.account import Account
from weightfold.quant.codes import CodedModel
from weightfold.quant.trimming import Judge, trimmed


def drawn(seed: int) -> tuple[nn.Module, CodedModel]:
    """A network whose rows, columns and steps differ much, as its codes."""
    g = np.random.default_rng(seed)
    net, coded = nn.Sequential(nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 5)), {}
    for name in ("0.weight", "2.weight", "4.weight"):
        shape = tuple(net.get_parameter(name).shape)
        size = g.geometric(0.6, shape) * (g.random(shape) < g.random((shape[0], 1)) * g.random((1, shape[1])) * 2)
        steps = g.integers(-32, 0, shape[0]).astype(np.int16)
        coded[name] = CodedTensor((size * g.choice([-1, 1], shape)).astype(np.int16), steps)
    plain = {name: np.zeros(p.shape, np.float16) for name, p in net.named_parameters() if name not in coded}
    return net, CodedModel(coded, plain)


def judge_of(net: nn.Module, probe: list[tuple[Tensor, Tensor]]) -> Judge:
    return Judge(net, probe, F.mse_loss if probe else None, nullcontext)


@given(st.integers(0, 1000), st.floats(0.25, 0.97), st.booleans())
@settings(max_examples=12, deadline=None)
def test_a_file_is_as_small_as_wanted_and_hardly_smaller(seed: int, share: float, measured: bool) -> None:
    """Whatever the codes: at most the target, at most 1 % (or 3 bytes) below it, and every code goes towards zero."""
    net, model = drawn(seed)
    account = Account.of(net, recorded=False)
    least = account.written_bytes(
        replace(model, coded={n: CodedTensor(0 * t.codes, t.steps) for n, t in model.coded.items()})
    )
    target = int(least + share * (account.written_bytes(model) - least))
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))
    probe = [(x, torch.tanh(x[:, :5]))] if measured else []
    after = trimmed(model, list(model.coded), target, account.written_bytes, judge_of(net, probe))
    size = account.written_bytes(after)
    assert target - max(0.01 * target, 3) <= size <= target
    for name, tensor in after.coded.items():
        was = model.coded[name].codes
        assert (np.abs(tensor.codes) <= np.abs(was)).all()
        assert (tensor.codes * was >= 0).all()
        assert (tensor.steps == model.coded[name].steps).all()
    assert after.plain is model.plain


def test_where_nothing_is_left_the_smallest_file_is_given() -> None:
    net, model = drawn(0)
    account = Account.of(net)
    after = trimmed(model, list(model.coded), 1, account.written_bytes, judge_of(net, []))
    assert after.n_weights()[0] == 0


def test_without_a_probe_small_steps_go_first() -> None:
    codes = np.random.default_rng(0).choice([-1, 0, 1], (40, 60)).astype(np.int16)
    steps = np.where(np.arange(40) < 20, -16, 0).astype(np.int16)
    net, model = nn.Linear(60, 40, bias=False), CodedModel({"weight": CodedTensor(codes, steps)}, {})
    account = Account.of(net)
    after = trimmed(model, ["weight"], 0.85 * account.written_bytes(model), account.written_bytes, judge_of(net, []))
    gone = (codes != 0) & (after.coded["weight"].codes == 0)
    assert gone[:20].sum() > 100
    assert gone[20:].sum() == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_with_a_probe_what_is_never_used_goes_first(seed: int) -> None:
    """Half of the inputs are zero on all data, at the larger steps: nothing of the output changes."""
    g = np.random.default_rng(seed)
    codes = g.choice([-1, 0, 1], (30, 80)).astype(np.int16)
    net, model = nn.Linear(80, 30, bias=False), CodedModel({"weight": CodedTensor(codes, np.zeros(30, np.int16))}, {})
    x = torch.randn(256, 80) * (torch.arange(80) < 40)
    model.load_into(net)
    judge = judge_of(net, [(x, net(x).detach() + 0.1 * torch.randn(256, 30))])
    before, account = judge.value(model), Account.of(net)
    after = trimmed(model, ["weight"], 0.8 * account.written_bytes(model), account.written_bytes, judge)
    gone = (codes != 0) & (after.coded["weight"].codes == 0)
    assert gone[:, 40:].sum() > 3 * gone[:, :40].sum()
    blind = trimmed(model, ["weight"], 0.8 * account.written_bytes(model), account.written_bytes, judge_of(net, []))
    assert judge.value(after) - before < 0.6 * (judge.value(blind) - before)


def test_probes_of_several_inputs_and_of_odd_targets() -> None:
    """Tuples and mappings are cut into pieces, targets that are no tensors are taken whole."""
    net = nn.Bilinear(4, 4, 3, bias=False)
    codes = np.random.default_rng(0).choice([-1, 0, 1], (3, 4, 4)).astype(np.int16)
    model = CodedModel({"weight": CodedTensor(codes, np.zeros(3, np.int16))}, {})
    a, b, y = torch.randn(20, 4), torch.randn(20, 4), torch.randn(20, 3)
    pieces = [
        Judge(net, [batch], loss, nullcontext).curvature(model, ["weight"])["weight"]
        for batch, loss in (
            (((a, b), y), F.mse_loss),
            (({"input1": a, "input2": b}, y), F.mse_loss),
            (((a, b), "a word"), lambda answer, word: answer.square().mean()),
        )
    ]
    assert np.allclose(pieces[0], pieces[1])
    assert all(found.shape == (3, 16) and (found > 0).any() for found in pieces)
