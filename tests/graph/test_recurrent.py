"""Recurrent layers of any depth, packed or with a state that is given: what is free is exact, what is seen is true.

Edits are tried by `weightfold.graph.exactness`; statistics are compared with what the layers read, unrolled by hand.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.observe import Observer
from weightfold.graph.trace import trace

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def exact(model: nn.Module, example: object) -> ChannelGraph:
    """The graph of a model, once every edit that it admits has been tried."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    with exactness.float64():
        graph = trace(model, example)
        for group in graph:
            for check in exactness.check_group(model, graph, group.name, example, generator):
                assert not check.problem, f"{check.group}, {check.kind}: {check.problem}"
                assert check.error <= 1e-9, f"{check.group}, {check.kind}: off by {check.error:.2e}"
    return graph


def free(graph: ChannelGraph, edit: str = "merge") -> set[str]:
    """Tensors whose rows belong to a group that admits an edit."""
    return {a.tensor for g in graph if edit in g.admits for a in g.axes if a.role != "read"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KINDS = {
    "rnn": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "lstm_projected": (nn.LSTM, {"proj_size": 3}),
}
SHAPES = {
    "one_layer": {},
    "two_layers": {"num_layers": 2},
    "both_directions": {"bidirectional": True},
    "two_layers_both_directions": {"num_layers": 2, "bidirectional": True},
}


def build(kind: str, shape: str, width: int = 6, hidden: int = 6) -> tuple[nn.RNNBase, int]:
    """A recurrent layer and the width of its output."""
    make, settings = KINDS[kind]
    layer = make(width, hidden, batch_first=True, **settings, **SHAPES[shape])
    return layer, layer(torch.zeros(1, 1, width))[0].shape[-1]


class LearnedStart(nn.Module):
    def __init__(self, kind: str, shape: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.rnn, width = build(kind, shape)
        n = self.rnn.num_layers * (1 + self.rnn.bidirectional)
        self.h = nn.Parameter(torch.randn(n, 1, self.rnn.proj_size or 6))
        self.c = nn.Parameter(torch.randn(n, 1, 6))
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = (s.expand(-1, len(x), -1).contiguous() for s in (self.h, self.c))
        return self.out(self.rnn(F.relu(self.a(x)), (h, c) if isinstance(self.rnn, nn.LSTM) else h)[0])


class EncoderDecoder(nn.Module):
    def __init__(self, kind: str, shape: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.encoder, _ = build(kind, shape)
        self.decoder, width = build(kind, shape, width=4)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decoder(x, self.encoder(F.relu(self.a(x)))[1])[0])


class Packed(nn.Module):
    def __init__(self, kind: str, shape: str) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.rnn, width = build(kind, shape)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(F.relu(self.a(x)), [5, 3], batch_first=True)
        return self.out(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("shape", ["both_directions", "two_layers"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [LearnedStart, EncoderDecoder, Packed])
def test_given_states_and_packed_sequences_leave_hidden_units_free(
    make: Callable[[str, str], nn.Module], kind: str, shape: str
) -> None:
    torch.manual_seed(0)
    model = make(kind, shape)
    found = free(exact(model, draw(2, 5, 4)))
    names = ("h", "a.weight", "c" if kind.startswith("lstm") else "")
    assert {n for n, _ in model.named_parameters() if "weight_hh" in n or "weight_hr" in n or n in names} <= found


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_packed_with_a_state_sorted_or_not_with_lengths_that_are_data(kind: str) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.start = nn.Linear(4, 6), nn.Linear(4, 6)
            self.rnn, _ = build(kind, "two_layers")
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=False)
            h = self.start(x[:, 0]).tanh().expand(2, -1, -1).contiguous()
            y, _ = self.rnn(packed, (h, h) if kind == "lstm" else h)
            y, n = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1], padding_value=1.0)
            return self.out(y).sum(1) / n[:, None]

    graph = exact(Ragged(), (draw(3, 5, 4), torch.tensor([2, 5, 3])))
    assert {"a.weight", "start.weight", "rnn.weight_hh_l0", "rnn.weight_hh_l1"} <= free(graph)


def test_sequences_that_are_packed_from_a_list() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn, self.out = nn.Linear(4, 6), nn.GRU(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(pack_sequence([self.a(x[0]), self.a(x[1, :3])]))[1][0])

    assert {"a.weight", "rnn.weight_hh_l0"} <= free(exact(Listed(), draw(2, 5, 4)))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_cells_that_carry_their_state(kind: str) -> None:
    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.start, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
            self.cell = getattr(nn, f"{kind}Cell")(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x[:, 0]).tanh()
            state = (h, h) if kind == "LSTM" else h
            for t in range(3):
                state = self.cell(self.a(x[:, t]), state)
            return self.out(state[0] if kind == "LSTM" else state)

    graph = exact(Carried(), draw(2, 5, 4))
    assert {"a.weight", "start.weight", "cell.weight_hh"} <= free(graph)
    assert all(axis.tap is None for group in graph for axis in group.axes if axis.tensor == "cell.weight_hh")


@pytest.mark.parametrize("which", ["h", "c"])
@pytest.mark.parametrize("cell", [False, True])
def test_a_state_that_is_data_freezes_the_units_and_says_so(which: str, cell: bool) -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.out = nn.Linear(4, 6), nn.Linear(7, 3)
            self.rnn = nn.LSTMCell(6, 7) if cell else nn.LSTM(6, 7, batch_first=True)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            own = torch.zeros_like(state)
            pair = (state, own) if which == "h" else (own, state)
            y = self.a(x)
            return self.out(self.rnn(y[:, 0], pair)[0] if cell else self.rnn(y, tuple(s[None] for s in pair))[0])

    graph = exact(Given(), (draw(2, 5, 4), draw(2, 7)))
    assert free(graph) == {"a.weight", "a.bias"}
    reasons = [f.reason for f in graph.frozen if "weight_hh" in f.tensor and f.dim == 0]
    assert "starts from a state that is an input of the model; learn the state as a parameter" in reasons[0]


class Reads(torch.overrides.TorchFunctionMode):
    """What every linear operator and every recurrent layer is really called with, by the number of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[Tensor]] = {}

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is F.linear:
            self.seen.setdefault(id(args[1]), []).append(args[0].detach().double().reshape(-1, args[0].shape[-1]))
        if func is torch.addmm:
            self.seen.setdefault(id(args[2]._base), []).append(args[1].detach().double())
        return func(*args, **(kwargs or {}))  # pyright: ignore


def check_moments(model: nn.Module, graph: ChannelGraph, batch: tuple, reads: dict[str, Tensor]) -> set[str]:
    """Compare all moments that an observer takes with those of what the weights read; the names of those weights."""
    with Observer(model, graph, max_samples_per_batch=None) as observer, torch.no_grad():
        model(*batch)
    found = observer.statistics()
    for (tensor, _), moment in found.items():
        rows = reads[tensor][:, moment.place_C]
        assert moment.count == len(rows), tensor
        torch.testing.assert_close(moment.second(), rows.T @ rows / len(rows), msg=tensor)
    return {tensor for tensor, _ in found}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_of_what_a_layer_reads_also_where_widths_agree(kind: str, shape: str) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.rnn, width = build(kind, shape)
            self.out = nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(self.a(x))[0])

    torch.manual_seed(1)
    model, x = Tagger().double().eval(), draw(3, 5, 4)
    with torch.no_grad():
        a = model.a(x)
        y = model.rnn(a)[0]
    reads = {"out.weight": y.flatten(0, 1), "rnn.weight_ih_l0": a.flatten(0, 1)}
    reads["rnn.weight_ih_l0_reverse"] = reads["rnn.weight_ih_l0"]
    seen = check_moments(model, trace(model, x), (x,), reads)
    assert {"out.weight", "rnn.weight_ih_l0"} <= seen


def test_statistics_of_packed_keyword_and_stateful_calls() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.one, self.out = nn.Linear(4, 6), nn.GRU(6, 6, batch_first=True), nn.Linear(6, 3)
            self.two, self.cell = nn.GRU(6, 6), nn.GRUCell(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y, h = self.one(hx=torch.ones(1, 3, 6).to(x), input=self.a(x))
            packed = pack_padded_sequence(y, [5, 4, 2], batch_first=True)
            h = self.two(packed, h)[1]
            return self.out(input=self.cell(hx=h[0], input=y[:, 0]))

    torch.manual_seed(2)
    model, x = Called().double().eval(), draw(3, 5, 4)
    with torch.no_grad():
        a = model.a(x)
        y, h = model.one(a, torch.ones(1, 3, 6).to(x))
        steps = torch.cat([y[:n, t] for t, n in enumerate((3, 3, 2, 2, 1))])
        last = model.cell(y[:, 0], model.two(pack_padded_sequence(y, [5, 4, 2], batch_first=True), h)[1][0])
    reads = {"one.weight_ih_l0": a.flatten(0, 1), "two.weight_ih_l0": steps, "cell.weight_ih": y[:, 0]}
    assert check_moments(model, trace(model, x), (x,), reads | {"out.weight": last}) == {*reads, "out.weight"}


class Twice(nn.Module):
    """One weight, read by its module's input and by what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).relu(), self.weight)


class Changed(nn.Module):
    """What the module was given is not what its weight reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.square(), self.weight)


class Second(nn.Module):
    """The weight reads the second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.linear(y, self.weight)


class Turned(nn.Module):
    """Moves that leave the channels where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(torch.zeros(6).to(x), x.transpose(0, 1).reshape(-1, 6), self.weight.t())


@pytest.mark.parametrize("inner", [Twice, Changed, Second, Turned, lambda: nn.MultiheadAttention(6, 2, kdim=6, vdim=6)])
def test_only_what_a_module_is_given_counts_as_read(inner: Callable[[], nn.Module]) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner, self.out = nn.Linear(4, 6), inner(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            if isinstance(self.inner, nn.MultiheadAttention):
                return self.out(self.inner(h, h.relu(), h.square())[0])
            return self.out(self.inner(h, h.relu()) if isinstance(self.inner, Second) else self.inner(h))

    torch.manual_seed(4)
    model, x = Around().double().eval(), draw(3, 5, 4)
    with Reads() as reads, torch.no_grad():
        model(x)
    names = {id(p): n for n, p in model.named_parameters()}
    rows = {names[i]: torch.cat(parts) for i, parts in reads.seen.items() if i in names}
    assert "out.weight" in check_moments(model, trace(model, x), (x,), rows)
