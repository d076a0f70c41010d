"""The algebra of edits, by property: composition, inverses, undo, records, and the graph that `apply` predicts."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from weightfold.errors import EditError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.edit import Edit
from weightfold.graph.exactness import relative_error
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import trace


class Mixed(nn.Module):
    """Convolutions with a residual, a flattened head, chunks: groups with blocks, several slots and shared axes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.fc, self.gate, self.out = nn.Linear(6 * 4, 10), nn.Linear(5, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        a, b = self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1)).chunk(2, -1)
        a, b = self.gate(torch.tanh(a) * b).chunk(2, -1)
        return self.out(F.silu(a) * b)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(6, 12)
        self.o, self.out = nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        return self.out(F.relu(self.o(y.transpose(1, 2).flatten(2))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0].mean(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.deep = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 12, 3, groups=12)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.deep(F.relu(self.b(F.relu(self.a(x))))))).mean((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mixed": (Mixed, (2, 3, 6, 6)),
    "heads": (Heads, (2, 5, 6)),
    "recurrent": (Recurrent, (2, 5, 5)),
    "grouped": (Grouped, (2, 3, 9, 9)),
}


def _made(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    torch.manual_seed(1)
    build, shape = NETS[name]
    model, example = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    return model, example, with_sizes(model, example, trace(model, example))


MADE = {name: _made(name) for name in NETS}
PLACES = [
    (name, group.name)
    for name, (_, _, graph) in MADE.items()
    for group in graph
    if {"permute", "merge"} <= group.admits
]


def fresh(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    model, example, graph = MADE[name]
    return copy.deepcopy(model), example, graph


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def sizes(model: nn.Module) -> dict[str, Any]:
    kinds = (int, tuple, str, bool)
    return {f"{p}.{k}": v for p, m in model.named_modules() for k, v in vars(m).items() if isinstance(v, kinds)}


def assert_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)


def blocks_of(group: ChannelGroup) -> list[list[int]]:
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    return [(block == b).nonzero().flatten().tolist() for b in torch.unique(block)]


# strategies: a random edit of each kind, equally many of every block --------------------------------------------------


def orders(draw: Any, group: ChannelGroup) -> Tensor:
    order = torch.arange(group.n_channels)
    for mine in blocks_of(group):
        order[torch.tensor(mine)] = torch.tensor(draw(st.permutations(mine)))
    return order


def kept(draw: Any, group: ChannelGroup) -> Tensor:
    width = draw(st.integers(1, min(map(len, blocks_of(group)))))
    chosen = [draw(st.permutations(mine))[:width] for mine in blocks_of(group)]
    return torch.tensor(sorted(c for mine in chosen for c in mine))


def labels(draw: Any, group: ChannelGroup) -> Tensor:
    """Merge one channel of every block into another, or nothing."""
    out = torch.arange(group.n_channels)
    if min(map(len, blocks_of(group))) > 1 and draw(st.booleans()):
        for mine in blocks_of(group):
            a, b = draw(st.permutations(mine))[:2]
            out[b] = a
    return out


def copies(draw: Any, group: ChannelGroup) -> Tensor:
    out = torch.ones(group.n_channels, dtype=torch.long)
    for mine in blocks_of(group):
        out[draw(st.sampled_from(mine))] = 2
    return out


def one_edit(draw: Any, group: ChannelGroup) -> Edit:
    kinds = ["permute", "remove", "merge", "split", "fold"]
    kind = draw(st.sampled_from(kinds if "merge" in group.admits else kinds[:2]))
    if kind == "permute":
        return edits.permute(group, orders(draw, group))
    if kind == "remove":
        return edits.remove(group, kept(draw, group))
    if kind == "merge":
        return edits.merge(group, labels(draw, group))
    if kind == "split":
        return edits.split(group, copies(draw, group))
    keep = kept(draw, group)
    drop = torch.tensor(sorted(set(range(group.n_channels)) - set(keep.tolist())), dtype=torch.long)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    maps = {}
    for axis in group.role("read"):  # of channels that a reader does not have, too
        maps[axis.key] = torch.randn(drop.numel(), keep.numel(), generator=generator, dtype=torch.float64)
    return edits.fold(group, keep, maps)


@st.composite
def places_with_edit(draw: Any) -> tuple[str, Edit]:
    name, group = draw(st.sampled_from(PLACES))
    return name, one_edit(draw, MADE[name][2][group])


@st.composite
def places_with_two_edits(draw: Any) -> tuple[str, Edit, Edit]:
    name, first = draw(places_with_edit())
    model, _, graph = fresh(name)
    later, _ = apply(model, graph, first)
    return name, first, one_edit(draw, later[first.group])


examples = settings(max_examples=40, deadline=None)

# properties -----------------------------------------------------------------------------------------------------------


@examples
@given(places_with_two_edits())
def test_a_composition_is_one_edit_after_the_other(case: tuple[str, Edit, Edit]) -> None:
    name, first, second = case
    model, _, graph = fresh(name)
    graph, _ = apply(model, graph, first)
    graph, _ = apply(model, graph, second)
    both, _, graph_both = fresh(name)
    graph_both, _ = apply(both, graph_both, first.then(second))
    close(bits(model), bits(both))
    assert sizes(model) == sizes(both)
    assert [g.n_channels for g in graph] == [g.n_channels for g in graph_both]


@examples
@given(places_with_edit(), st.data())
def test_a_permutation_and_its_inverse_are_nothing_bit_for_bit(case: tuple[str, Edit], data: Any) -> None:
    name, group_name = case[0], case[1].group
    model, _, graph = fresh(name)
    before = bits(model)
    order = orders(data.draw, graph[group_name])
    edited, _ = apply(model, graph, edits.permute(graph[group_name], order))
    apply(model, edited, edits.permute(edited[group_name], torch.argsort(order)))
    assert_bits(before, bits(model))


@examples
@given(places_with_edit(), st.data())
def test_a_split_and_the_merge_of_its_copies_are_nothing(case: tuple[str, Edit], data: Any) -> None:
    name, group_name = case[0], case[1].group
    model, example, graph = fresh(name)
    before, output = bits(model), model(example).detach()
    group = graph[group_name]
    number = copies(data.draw, group)
    edited, _ = apply(model, graph, edits.split(group, number))
    assert relative_error([output], [model(example).detach()]) < 1e-12
    source = torch.repeat_interleave(torch.arange(group.n_channels), number)
    edited, _ = apply(model, edited, edits.merge(edited[group_name], source))
    close(before, bits(model))
    assert edited[group_name].n_channels == group.n_channels
    assert [g.n_channels for g in edited] == [g.n_channels for g in graph]


@examples
@given(places_with_edit(), st.booleans())
def test_an_undo_is_exact_to_the_bit(case: tuple[str, Edit], training: bool) -> None:
    name, edit = case
    model, example, graph = fresh(name)
    model.train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    averaged = AveragedModel(model)
    shadow = {k: v.detach().clone() for k, v in model.named_parameters()}
    loss = model(example).square().mean()
    loss.backward()
    optimizer.step()
    before, attributes, mean = bits(model), sizes(model), bits(averaged)
    identities = [id(p) for p in model.parameters()]
    state = {k: {n: copy.deepcopy(v) for n, v in optimizer.state[p].items()} for k, p in model.named_parameters()}
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    kept_shadow = {k: v.clone() for k, v in shadow.items()}

    edited, undo = apply(model, graph, edit, [optimizer], [averaged, shadow])
    edited.validate()
    assert {n: v.shape for n, v in averaged.module.state_dict().items()} == {k: v.shape for k, v in bits(model).items()}
    assert all(shadow[k].shape == p.shape for k, p in model.named_parameters())
    undo.restore()

    assert_bits(before, bits(model))
    assert_bits(mean, bits(averaged))
    assert_bits(kept_shadow, shadow)
    assert sizes(model) == attributes
    assert [id(p) for p in model.parameters()] == identities
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == held
    assert len(optimizer.state) == len(state)
    for key, p in model.named_parameters():
        assert_bits(state[key], optimizer.state[p])
    assert loss.grad_fn is not None


@examples
@given(places_with_edit())
def test_a_record_is_exact(case: tuple[str, Edit]) -> None:
    _, edit = case
    blobs: dict[str, bytes] = {}

    def put(data: bytes) -> str:
        blobs[str(len(blobs))] = data
        return str(len(blobs) - 1)

    again = Edit.from_record(edit.to_record(put), blobs.__getitem__)
    assert (again.group, again.kind, again.n_channels, again.gauge) == (
        edit.group, edit.kind, edit.n_channels, edit.gauge,
    )  # fmt: skip
    assert torch.equal(again.carry, edit.carry)
    assert_bits(again.tensors(), edit.tensors())


def table(graph: ChannelGraph) -> dict[str, Any]:
    """Groups with at least two channels: names, sizes, blocks and index tables up to the order of slots."""
    out: dict[str, Any] = {}
    for g in graph:
        if g.n_channels > 1 and g.free:
            axes = {(a.tensor, a.dim, a.slabs): (a.size, torch.sort(a.index, 1).values.tolist()) for a in g.axes}
            out[g.name] = (g.kind, g.n_channels, None if g.block is None else g.block.tolist(), axes)
    return out


@examples
@given(places_with_edit())
def test_the_predicted_graph_is_that_of_a_fresh_trace(case: tuple[str, Edit]) -> None:
    name, edit = case
    if edit.n_after < 2 or edit.kind == "split":
        return
    model, example, graph = fresh(name)
    predicted, _ = apply(model, graph, edit)
    if any(g.n_channels < 2 or (g.block is not None and _thin(g)) for g in predicted):
        return
    found = trace(model, example)
    assert dict(predicted.shapes) == dict(found.shapes)
    assert table(predicted) == table(found)


def _thin(group: ChannelGroup) -> bool:
    assert group.block is not None
    return int(torch.bincount(group.block).min()) < 2


# what is refused ------------------------------------------------------------------------------------------------------


def _wrong(group: ChannelGroup, what: str) -> Edit:
    n = group.n_channels
    key = group.role("read")[0].key
    ones = torch.ones(1, n - 1, dtype=torch.float64)
    match what:
        case "fewer labels":
            return edits.merge(group, torch.zeros(n - 1))
        case "empty":
            return edits.remove(group, torch.tensor([], dtype=torch.long))
        case "outside":
            return edits.remove(group, torch.tensor([0, n]))
        case "negative":
            return edits.remove(group, torch.tensor([-1, 0]))
        case "twice":
            return edits.permute(group, torch.zeros(n, dtype=torch.long))
        case "no copies":
            return edits.split(group, torch.zeros(n, dtype=torch.long))
        case "shares":
            return edits.split(group, torch.ones(n, dtype=torch.long), torch.full((n,), 0.5))
        case "map's shape":
            return edits.fold(group, torch.arange(n - 1), {key: torch.ones(2, 2)})
        case "map":
            return edits.fold(group, torch.arange(n - 1), {key: ones * float("nan")})
        case "constant":
            full = torch.full((n,), float("inf"), dtype=torch.float64)
            return edits.fold(group, torch.arange(n - 1), {key: ones}, {key: full})
        case "writers":
            return replace(edits.merge(group, torch.arange(n)), write=torch.full((n, n), float("nan")).double())
        case "size":
            return edits.remove(replace(group, n_channels=n + 1), torch.arange(n))
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    ["fewer labels", "empty", "outside", "negative", "twice", "no copies", "shares", "map's shape", "map", "constant",
     "writers", "size"],
)  # fmt: skip
def test_a_wrong_edit_leaves_the_model_untouched(what: str) -> None:
    model, _, graph = fresh("mixed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, attributes, identities = bits(model), sizes(model), [id(p) for p in model.parameters()]
    with pytest.raises(EditError) as caught:
        apply(model, graph, _wrong(graph["inner"], what), [optimizer])
    assert len(caught.value.message) > 20
    assert_bits(before, bits(model))
    assert sizes(model) == attributes
    assert [id(p) for p in model.parameters()] == identities


def test_unequal_counts_in_blocks_are_refused() -> None:
    model, _, graph = fresh("heads")
    before = bits(model)
    group = graph["v"]
    assert group.block is not None
    with pytest.raises(EditError, match="same number of channels"):
        edits.remove(group, torch.arange(group.n_channels - 1))
    with pytest.raises(EditError, match="within their blocks"):
        edits.permute(group, torch.arange(group.n_channels - 1, -1, -1))
    one, two, three = ((group.block == b).nonzero().flatten() for b in range(3))
    merged = torch.arange(group.n_channels)
    merged[two[0]] = merged[one[1]] = merged[one[0]]
    merged[three[1]] = merged[three[0]]
    with pytest.raises(EditError, match=r"different blocks|same number"):
        edits.merge(group, merged)
    merged[one[1]] = one[1]
    merged[two[1]] = two[1]
    with pytest.raises(EditError, match=r"different blocks|same number"):
        edits.merge(group, merged)
    assert_bits(before, bits(model))


def test_a_model_that_changed_since_is_refused() -> None:
    model, _, graph = fresh("mixed")
    edit = edits.remove(graph["inner"], torch.arange(5))
    apply(model, graph, edit)
    before = bits(model)
    with pytest.raises(EditError, match=r"trace it again|expects") as caught:
        apply(model, graph, edit)
    assert "inner.weight" in caught.value.message or "back.weight" in caught.value.message
    assert_bits(before, bits(model))


def test_an_optimiser_of_another_model_is_refused_before_anything_changes() -> None:
    model, _, graph = fresh("mixed")
    before = bits(model)
    foreign = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(EditError, match="not in the model"):
        apply(model, graph, edits.remove(graph["inner"], torch.arange(5)), [foreign])
    assert_bits(before, bits(model))


def test_an_edit_that_fails_halfway_is_taken_back() -> None:
    model, _, graph = fresh("mixed")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    group = replace(graph["inner"], attributes=(("fc", "no_such_attribute", Fraction(1)),))
    broken = graph.with_groups(tuple(group if g.name == "inner" else g for g in graph))
    before, attributes = bits(model), sizes(model)
    with pytest.raises(AttributeError):
        apply(model, broken, edits.remove(group, torch.arange(5)), [optimizer])
    assert_bits(before, bits(model))
    assert sizes(model) == attributes


def test_an_undo_keeps_identities_in_recurrent_layers() -> None:
    """Recurrent layers hold their parameters a second time, behind weak references."""
    model, example, graph = fresh("recurrent")
    optimizer = torch.optim.Adam(model.parameters())
    output = model(example)
    held = output.square().sum()
    identities = [id(p) for p in model.parameters()]
    [name] = [g.name for g in graph if g.name.startswith("rnn")]
    group = graph[name]
    _, undo = apply(model, graph, edits.remove(group, kept_half(group)), [optimizer])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    model(example).sum().backward()
    undo.restore()
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(model(example), output)
    assert held.grad_fn is not None


def kept_half(group: ChannelGroup) -> Tensor:
    return torch.tensor(sorted(c for mine in blocks_of(group) for c in mine[: len(mine) // 2]))


def test_averages_under_other_names_are_refused() -> None:
    model, _, graph = fresh("mixed")
    shadow = {f"_orig_mod.{k}": v.detach().clone() for k, v in model.named_parameters()}
    before = bits(model)
    with pytest.raises(EditError, match="_orig_mod"):
        apply(model, graph, edits.remove(graph["inner"], torch.arange(5)), (), [shadow])
    assert_bits(before, bits(model))


def test_averages_in_a_mapping_take_up_constants_as_the_model_does() -> None:
    model, _, graph = fresh("mixed")
    group = graph["fc"]
    shadow = {k: v.detach().clone() for k, v in model.named_parameters()}
    keep = kept_half(group)
    n = group.n_channels
    maps = {a.key: torch.rand(n - keep.numel(), keep.numel(), dtype=torch.float64) for a in group.role("read")}
    shift = {key: torch.rand(n, dtype=torch.float64) for key in maps}
    _, undo = apply(model, graph, edits.fold(group, keep, maps, shift), (), [shadow])
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), shadow[name]), name
    undo.restore()
    assert_bits({k: v for k, v in MADE["mixed"][0].state_dict().items() if k in shadow}, shadow)


class Mirrored(nn.Module):
    """The same channels twice, the second time backwards: neighbours that are no window."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.b(torch.cat([x, x.flip(-1)], -1))


@pytest.mark.parametrize("channel", range(4))
def test_a_copy_stands_where_the_forward_looks_for_it(channel: int) -> None:
    torch.manual_seed(0)
    model, example = Mirrored().double(), torch.randn(5, 3, dtype=torch.float64)
    graph = trace(model, example)
    number = torch.ones(4, dtype=torch.long)
    number[channel] = 2
    output = model(example).detach()
    apply(model, graph, edits.split(graph["a"], number))
    assert relative_error([output], [model(example).detach()]) < 1e-12


def test_a_single_channel_with_several_places_is_not_split() -> None:
    model, _, graph = fresh("mixed")
    graph, _ = apply(model, graph, edits.remove(graph["fc"], torch.tensor([2])))
    with pytest.raises(EditError, match="cannot be told apart"):
        edits.split(graph["fc"], torch.tensor([2]))


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_training_goes_on_while_the_last_loss_is_held(name: str, watched: bool, back: bool) -> None:
    """The user's loop keeps its loss until the next one: neither an edit nor its undo may trip over that graph."""
    model, example, graph = fresh(name)
    parameters = list(model.parameters())
    references = [weakref.ref(p) for p in parameters] if watched else []
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    seen = []
    parameters[0].register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.shape)))
    group = next(g for g in graph if {"permute", "merge"} <= g.admits)
    loss = torch.zeros(())
    for step in range(4):
        loss = model(example).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            _, undo = apply(model, graph, edits.remove(group, kept_half(group)), [optimizer])
            if back:
                undo.restore()
    assert bool(torch.isfinite(loss))
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert len(seen) == 4
    assert all(r() is not None for r in references)


def test_a_graph_recorded_before_an_edit_is_refused_by_autograd() -> None:
    model, example, graph = fresh("mixed")
    stale = model(example).square().mean()
    group = graph["inner"]
    apply(model, graph, edits.permute(group, torch.arange(group.n_channels - 1, -1, -1)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
