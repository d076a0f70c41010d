"""Differences between models: exact to the bit for every type, small where models are near, never wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightfold.artifact.rangecoder import Decoder, Encoder
from weightfold.errors import ArtifactError, ConfigError, WeightfoldError
from weightfold.fingerprint import digest
from weightfold.weights.disguise import disguise
from weightfold.weights.symmetry import symmetries
from weightfold.zoo.delta import codec, movecode, rans
from weightfold.zoo.delta.codec import decode, encode
from weightfold.zoo.delta.layout import DTYPES
from weightfold.zoo.delta.matching import match
from weightfold.zoo.delta.moves import Alignment, Factors, Order, Place, balance_of

State = dict[str, Tensor]


def make(seed: int = 0) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 5))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return net


def state_of(net: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def tuned(state: State, seed: int = 1, size: float = 0.01) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: v + size * torch.randn(v.shape, generator=generator) for n, v in state.items()}


def n_bits(data: bytes, state: State) -> float:
    return 8 * len(data) / sum(v.numel() for v in state.values())


def anything(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Every bit at random: NaN with payloads, infinities, both zeros, numbers below the normal ones."""
    n = torch.Size(shape).numel() * dtype.itemsize
    octets = torch.randint(0, 2 if dtype == torch.bool else 256, (n,), generator=generator, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape) if n else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("near", [True, False])
def test_any_bits_of_any_type_come_back(dtype: torch.dtype, near: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {"": (), "empty": (0,), "none": (3, 0, 2), "row": (7,), "matrix": (33, 41), "cube": (5, 2, 3, 3)}
    parent = {name: anything(dtype, shape, generator) for name, shape in shapes.items()}
    child = {name: anything(dtype, shape, generator) for name, shape in shapes.items()}
    if near:  # half of the numbers as they were
        child = {n: torch.where(torch.rand(v.shape, generator=generator) < 0.5, v, parent[n]) for n, v in child.items()}
    back = decode(encode(child, parent), parent)
    assert digest(back) == digest(child)
    assert [(n, v.dtype, v.shape) for n, v in back.items()] == [(n, v.dtype, v.shape) for n, v in sorted(child.items())]


def test_signed_zeros_and_nan_payloads_survive_a_prediction() -> None:
    bits = torch.tensor(
        [0x80000000 - (1 << 32), 0, 0x7FC00001, 0xFFC12345 - (1 << 32), 0x7F800000, 1], dtype=torch.int32
    )
    child = {"w": bits.view(torch.float32)}
    parent = {"w": torch.tensor([0.0, -0.0, 1.0, -2.0, 3.0, 0.0])}
    assert decode(encode(child, parent), parent)["w"].view(torch.int32).tolist() == bits.tolist()


def test_a_fine_tuned_child_takes_what_its_differences_hold_and_a_copy_takes_nothing() -> None:
    """Differences N(0, .01): log2(.01 (2 pi e)^.5) = -4.6 bits above 1; a last place is 2^-26.1 on the average of
    weights N(0, .3): 21.5 bits each."""
    parent = state_of(make())
    child = tuned(parent)
    assert 21.3 < n_bits(encode(child, parent), child) < 22.8
    assert len(encode(parent, parent)) < 20
    assert n_bits(encode(tuned(parent, size=1.0), parent), child) < 32.5


def test_other_shapes_missing_and_new_tensors_are_coded_alone() -> None:
    parent = state_of(make())
    child = {"new": torch.randn(9, 9), **parent, "0.weight": torch.randn(3, 20)}
    del child["4.bias"]
    back = decode(encode(child, parent), parent)
    assert list(back) == sorted(child)
    assert digest(back) == digest(child)
    assert digest(decode(encode(child, {}), {})) == digest(child)
    assert decode(encode({}, parent), parent) == {}


def test_types_may_differ_from_the_parents() -> None:
    parent = state_of(make())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        child = {n: v.to(dtype) for n, v in parent.items()}
        data = encode(child, parent)
        assert digest(decode(data, parent)) == digest(child)
        assert n_bits(data, child) < 2  # rounding the parent predicts every bit; what is left is a list of types
        assert digest(decode(encode(parent, child), child)) == digest(parent)


def test_the_order_of_names_does_not_matter() -> None:
    parent = state_of(make())
    child = tuned(parent)
    data = encode(child, parent)
    for state in (dict(reversed(parent.items())), dict(sorted(parent.items()))):
        assert digest(decode(data, state)) == digest(child)
    assert encode(dict(reversed(child.items())), parent) == data


def test_zeros_without_a_counterpart_do_not_look_like_an_attack() -> None:
    child = {"w": torch.zeros(1000, 1000)}
    assert digest(decode(encode(child, {}), {})) == digest(child)


def test_ties_come_back_as_one_object_and_equal_tensors_as_two() -> None:
    shared = torch.randn(4, 4)
    child = {"a": shared, "b": shared, "c": shared.clone(), "d": torch.zeros(3)}
    for parent in (dict(child), {}, {n: v.clone() for n, v in child.items()}):
        back = decode(encode(child, parent), parent)
        assert back["a"] is back["b"]
        assert back["c"] is not back["a"]
        assert digest(back) == digest(child)
        back["c"].zero_()
        assert not torch.equal(back["a"], back["c"])


def test_a_result_shares_no_memory_with_the_parent() -> None:
    parent = state_of(make())
    back = decode(encode(parent, parent), parent)
    back["0.weight"].zero_()
    assert parent["0.weight"].abs().sum() > 0


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("step", [None, 0.02])
def test_a_disguised_child_costs_little_more_than_a_plain_one(spread: float, step: float | None) -> None:
    net = make()
    parent, example = state_of(net), torch.zeros(1, 20)
    plain = tuned(parent)
    net.load_state_dict(plain)
    found = symmetries(net, example)
    child = state_of(disguise(net, example, torch.Generator().manual_seed(5), spread=spread, found=found))
    moves = match(found, child, parent)
    data = encode(child, parent, moves=moves, step=step)
    back = decode(data, parent)
    if step is None:
        assert digest(back) == digest(child)
    else:
        net.load_state_dict(back)
        twin = make()
        twin.load_state_dict(plain)
        x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert float((net(x) - twin(x)).norm() / twin(x).norm()) < 0.1
    extra = n_bits(data, child) - n_bits(encode(plain, parent, step=step), child)
    order = 8 * 16 / sum(v.numel() for v in child.values())  # log2(24!) + log2(16!) = 123 bits
    assert extra < order + (1.6 if spread else 0.3)
    assert n_bits(encode(child, parent, step=step), child) > n_bits(data, child) + 2


def test_a_rescaled_copy_is_nearly_free() -> None:
    net = make()
    parent, example = state_of(net), torch.zeros(1, 20)
    child = state_of(disguise(net, example, torch.Generator().manual_seed(5)))
    moves = match(symmetries(net, example), child, parent)
    data = encode(child, parent, moves=moves)
    assert digest(decode(data, parent)) == digest(child)
    assert n_bits(data, child) < 6  # factors of 24 digits for 40 units, and a last place here and there


def test_steps_bound_the_error_and_coarser_ones_are_smaller() -> None:
    parent = state_of(make())
    child = tuned(parent)
    sizes = []
    for step in (0.002, 0.02, 0.2):
        data = encode(child, parent, step=step)
        back = decode(data, parent)
        assert all(float((back[n] - child[n]).abs().max()) <= 0.7001 * step for n in child)
        sizes.append(len(data))
        assert codec.is_lossy(data)
    assert sizes == sorted(sizes, reverse=True)
    assert not codec.is_lossy(encode(child, parent))
    assert len(encode(child, parent, step=2.0, relative=True)) < len(encode(child, parent, step=0.2, relative=True))


def test_carrying_keeps_sums_over_inputs() -> None:
    parent = {"w": torch.randn(16, 200, generator=torch.Generator().manual_seed(0))}
    child = tuned(parent)
    errors = {}
    for carry in (False, True):
        back = decode(encode(child, parent, step=0.03, carry=carry), parent)
        errors[carry] = back["w"] - child["w"]
    assert float(errors[True].sum(1).abs().max()) <= 0.7001 * 0.03 < float(errors[False].sum(1).abs().max())
    assert float(errors[True].abs().max()) <= 1.4001 * 0.03


def test_whole_numbers_and_broken_ones_stay_exact_in_steps() -> None:
    parent = {"n": torch.tensor(5), "w": torch.randn(4, 4), "v": torch.ones(6), "i": torch.randint(0, 99, (8, 8))}
    child = {"n": torch.tensor(9), "w": parent["w"].clone(), "v": torch.rand(6) + 1e-4, "i": parent["i"] + 1}
    child["w"][0, 0] = torch.nan
    back = decode(encode(child, parent, step=0.5), parent)
    assert digest({"n": back["n"], "w": back["w"], "i": back["i"]}) == digest({n: child[n] for n in "nwi"})
    assert bool((back["v"] > 0).all())  # a variance stays one


def test_steps_must_be_above_zero() -> None:
    for step in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="must be above 0"):
            encode({}, {}, step=step)


@pytest.mark.parametrize("step", [None, 0.02])
def test_every_cut_and_every_flipped_byte_is_refused(step: float | None) -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    parent, example = state_of(net), torch.zeros(1, 5)
    net.load_state_dict(tuned(parent, size=0.03))
    child = state_of(disguise(net, example, torch.Generator().manual_seed(1)))
    child["more"] = torch.randn(3)
    moves = match(symmetries(net, example), child, parent)
    data = encode(child, parent, moves=moves, step=step)
    assert moves.orders
    assert moves.factors
    decode(data, parent)
    for end in range(len(data)):
        with pytest.raises(ArtifactError):
            decode(data[:end], parent)
    for place in range(len(data)):
        flipped = data[place] ^ (1 + 37 * place % 255)
        with pytest.raises(ArtifactError):
            decode(data[:place] + bytes([flipped]) + data[place + 1 :], parent)
    with pytest.raises(ArtifactError):
        decode(data + b"\0", parent)


def test_another_parent_is_refused() -> None:
    parent = state_of(make())
    data = encode(tuned(parent), parent)
    for other in (tuned(parent, seed=2), {}, {"0.weight": parent["0.weight"]}):
        with pytest.raises(WeightfoldError):
            decode(data, other)
    with pytest.raises(ArtifactError, match="no difference between models"):
        decode(b"PK\3\4 something else altogether", parent)


def test_sizes_that_nothing_explains_are_refused_before_they_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few bytes that promises a tensor of a terabyte."""
    child = {"w": torch.zeros(64, 1)}
    fits: Callable[..., bool] = codec._fits
    monkeypatch.setattr(codec, "_fits", lambda *_: True)
    real = codec.entries_of(child, {})
    huge = [codec.Entry("w", torch.float32, (1 << 38, 1), None)]
    monkeypatch.setattr(codec, "write_layout", lambda _: _layout(huge))
    data = encode(child, {})
    assert real[0].numel == 64
    monkeypatch.setattr(codec, "_fits", fits)
    with pytest.raises(ArtifactError, match="larger than its parent and its length explain"):
        decode(data, {})


@pytest.mark.parametrize("shape", [(0, 1 << 62, 1 << 62), (0, (1 << 63) - 1, 3)])
def test_shapes_whose_strides_are_no_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """Tensors without numbers take no room, whatever they claim."""
    entries = [codec.Entry("w", torch.float32, shape, None)]
    monkeypatch.setattr(codec, "write_layout", lambda _: _layout(entries))
    data = encode({"w": torch.zeros(0, 3)}, {})
    with pytest.raises(ArtifactError, match="has the shape"):
        decode(data, {})


def test_what_is_not_finite_has_no_exponent_to_balance_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """C leaves open which exponent infinity and NaN have: a machine that says -1 decodes the same numbers."""
    place = Place(0, 0, 1, np.arange(3)[:, None])
    moves = Alignment((), (Factors((place, Place(1, 0, 1, np.arange(3)[:, None], -1)), np.array([1.0, 2.0, 4.0])),))
    values = [np.array([[1.0, np.inf], [3.0, np.nan], [0.5, 2.0]]), np.full((3, 2), 8.0)]
    wanted = balance_of(moves, values, [(3, 2), (3, 2)])
    real = np.frexp

    def other(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mantissa, exponent = real(x)
        return mantissa, np.where(np.isfinite(x), exponent, -1)

    monkeypatch.setattr(np, "frexp", other)
    found = balance_of(moves, values, [(3, 2), (3, 2)])
    assert all(np.array_equal(wanted[i], found[i]) for i in wanted)


def test_moves_without_end_are_refused_before_they_are_allocated() -> None:
    """Places are read one after the other; those that a tensor cannot explain stop the reading."""
    shapes = [(1000, 1000)]
    place = Place(0, 0, 1, np.arange(1000)[:, None])
    coder = Encoder()
    movecode.write(coder, Alignment((Order((place,) * 200, np.arange(1000)),)), 12)
    with pytest.raises(ArtifactError, match="channels of 1 positions"):
        movecode.read(Decoder(coder.finish()), shapes)


@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_an_order_takes_as_many_bits_as_there_are_orders(n: int) -> None:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).numpy()
    coder = Encoder()
    movecode.write_order(coder, order)
    assert coder.bits < math.lgamma(n + 1) / math.log(2) + 0.5
    assert np.array_equal(movecode.read_order(Decoder(coder.finish()), n), order)


def _layout(entries: list[codec.Entry]) -> bytes:
    from weightfold.zoo.delta.layout import write_layout

    return write_layout(entries)


@pytest.mark.parametrize("n", [0, 1, 2, 1023, 5000])
def test_streams_of_symbols(n: int) -> None:
    rng = np.random.default_rng(n)
    contexts = rng.integers(0, 3, n)
    symbols = np.minimum(rng.geometric(0.1 + 0.2 * contexts, n) if n else np.zeros(0, np.int64), 99)
    tables = rans.Tables.of(symbols, contexts, 3, 100)
    stream = rans.encode(symbols, contexts, tables)
    assert np.array_equal(rans.decode(stream, contexts, tables), symbols)
    if n == 5000:
        share = np.stack([np.bincount(symbols[contexts == c], minlength=100) for c in range(3)]).astype(float)
        chance = share / share.sum(1, keepdims=True)
        entropy = -(share[share > 0] * np.log2(chance[share > 0])).sum()
        assert 16 * len(stream.words) < 1.02 * entropy + 200
        with pytest.raises(ArtifactError):
            rans.decode(rans.Stream(stream.states_L, stream.words[:-1]), contexts, tables)
