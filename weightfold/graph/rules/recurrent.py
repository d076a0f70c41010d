"""Rules for LSTM, GRU and plain RNN operators: one hidden unit across gates, layers' weights and time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightfold.graph.labels import FROZEN, READ, WRITE, Field, Store, Value
from weightfold.graph.rules.core import rule, shapes_of
from weightfold.graph.rules.products import linear

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True)
class Cell:
    """Weights of one layer in one direction; ``project`` is LSTM's projection of the hidden state."""

    w_ih: Value
    w_hh: Value
    biases: tuple[Value, ...]
    project: Value | None = None


def _labels(value: Value, dim: int) -> Tensor:
    item = next((f for f in value.fields if f.support == {dim}), None)
    return torch.zeros(value.shape[dim], dtype=torch.long) if item is None else item.labels.flatten()


def _unit(store: Store, kind: str, cell: Cell) -> Field:
    """Tie the rows of all gates and the columns that read the hidden state; return the output's labels (1, 1, H)."""
    gates = GATES[kind]
    n_hidden = cell.w_hh.shape[0] // gates
    writers = [_labels(w, 0).reshape(gates, n_hidden) for w in (cell.w_ih, cell.w_hh, *cell.biases)]
    unit = writers[0][0]
    for rows in writers:
        store.same(rows, unit)
        store.flag(rows, WRITE)
        for gate in range(gates):
            store.touches.append((store.node * 64 + 8 + gate, rows[gate]))
    if cell.project is not None:
        store.same(_labels(cell.project, 1), unit)
        store.flag(_labels(cell.project, 1), READ)
        store.flag(_labels(cell.project, 0), WRITE)
        unit_out = _labels(cell.project, 0)
    else:
        unit_out = unit
    columns = _labels(cell.w_hh, 1)
    store.same(columns, unit_out)
    store.flag(columns, READ)
    pos, sgn = _gauges(store, kind, writers, columns, unit_out, cell)
    shape = (1, 1, unit_out.numel())
    return Field(unit_out.reshape(shape), pos.reshape(shape), sgn.reshape(shape))


def _gauges(
    store: Store, kind: str, writers: Sequence[Tensor], columns: Tensor, out: Tensor, cell: Cell
) -> tuple[Tensor, Tensor]:
    """A tanh unit may change its sign, a ReLU unit its scale; gated units neither."""
    none = torch.zeros_like(out)
    everything = [w.flatten() for w in writers] + [columns]
    if cell.project is not None:
        everything += [_labels(cell.project, 0), _labels(cell.project, 1)]
    if kind != "rnn_relu":
        for atoms in everything:
            store.kill_pos(atoms)
    if kind != "rnn_tanh":
        for atoms in everything:
            store.kill_sgn(atoms)
    if kind == "rnn_relu":
        for rows in writers[1:]:
            store.same_pos(rows.flatten(), out)
        store.same_pos(-columns, out)
        return out, none
    if kind == "rnn_tanh":
        for rows in writers[1:]:
            store.same_sgn(rows.flatten(), out)
        store.same_sgn(columns, out)
        return none, out
    return none, none


def _cells(params: Sequence[Value], has_biases: bool, projected: bool) -> list[Cell]:
    step = 2 + 2 * has_biases + projected
    return [
        Cell(p[0], p[1], tuple(p[2:4]) if has_biases else (), p[-1] if projected else None)
        for p in (params[i : i + step] for i in range(0, len(params), step))
    ]


def _recurrent(kind: str) -> Any:
    def run(
        store: Store,
        node: torch.fx.Node,
        x: Value,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool = False,
    ) -> Any:
        result = shapes_of(node)
        states = hx if isinstance(hx, (list, tuple)) else [hx]
        directions = 2 if bidirectional else 1
        per_cell = len(params) // (num_layers * directions)
        cells = _cells(params, has_biases, per_cell == 3 + 2 * has_biases)
        outs: list[Field] = []
        for layer in range(num_layers):
            heads = []
            for cell in cells[layer * directions : (layer + 1) * directions]:
                linear(store, node, x, cell.w_ih)
                heads.append(_unit(store, kind, cell))
            outs += heads
            labels, pos, sgn = (torch.cat(arrays, 2) for arrays in zip(*(h.arrays() for h in heads), strict=True))
            joined = Field(labels, pos, sgn)
            x = _output(x, joined)
        if any(s.fields or not s.uniform for s in states):
            for out in outs:
                store.flag(out.labels, FROZEN, "starts from a given hidden state")
                store.kill(out)
            for s in states:
                store.freeze(s, "is a hidden state")
        _rects(store, cells, outs)
        stacked = torch.cat([o.labels for o in outs], 0).reshape(len(outs), 1, -1)
        none = torch.zeros_like(stacked)
        last = Value(result[1].shape, (Field(stacked, none, none),) if stacked.numel() > 1 else ())
        for out in outs if node_uses(node, 1) else []:
            store.kill(out)
        output = Value(result[0].shape, _fit(x.fields, len(result[0].shape)))
        rest = [last, *(Value(r.shape, _states(cells, kind)) for r in result[2:])]
        return [output, *rest]

    return run


def _states(cells: Sequence[Cell], kind: str) -> tuple[Field, ...]:
    """Labels of the cell states of all layers and directions, (L, 1, H)."""
    rows = [_labels(c.w_hh, 0).reshape(GATES[kind], -1)[0] for c in cells]
    labels = torch.stack(rows).unsqueeze(1)
    none = torch.zeros_like(labels)
    return (Field(labels, none, none),) if labels.numel() > 1 else ()


def _output(x: Value, joined: Field) -> Value:
    ndim = len(x.shape)
    shape = (*x.shape[:-1], joined.labels.shape[-1])
    return Value(shape, _fit((joined,), ndim))


def _fit(fields: tuple[Field, ...], ndim: int) -> tuple[Field, ...]:
    """Lay labels that vary along the last dimension out for ``ndim`` dimensions."""
    return tuple(f.map(lambda a: a.reshape((1,) * (ndim - 1) + (-1,))) for f in fields if f.labels.shape[-1] > 1)


def _rects(store: Store, cells: Sequence[Cell], outs: Sequence[Field]) -> None:
    """All layers and directions of one module share a single hidden size."""
    if len(cells) > 1:
        store.rect(torch.stack([o.labels.flatten() for o in outs]))
        if cells[0].project is not None:
            store.rect(torch.stack([_labels(c.project, 1) for c in cells if c.project is not None]))


def node_uses(node: torch.fx.Node, index: int) -> bool:
    """Whether any user picks output ``index`` and does something with it."""
    return any(len(user.args) > 1 and user.args[1] == index and user.users for user in node.users)


for _kind in GATES:
    rule(_kind)(_recurrent(_kind))


def _cell(kind: str) -> Any:
    def run(
        store: Store, node: torch.fx.Node, x: Value, hx: Any, w_ih: Value, w_hh: Value, *biases: Value | None
    ) -> Any:
        linear(store, node, x, w_ih)
        hidden = hx[0] if isinstance(hx, (list, tuple)) else hx
        if not hidden.uniform or hidden.fields:
            linear(store, node, hidden, w_hh)
        cell = Cell(w_ih, w_hh, tuple(b for b in biases if b is not None))
        unit = _unit(store, kind, cell)
        store.kill(unit)
        unit = unit.without_gauge()
        fields = _fit((unit,), len(x.shape))
        val = node.meta["val"]
        if isinstance(val, (tuple, list)):
            return [Value(tuple(v.shape), fields) for v in val]
        return Value(tuple(val.shape), fields)

    return run


for _kind in GATES:
    rule(f"{_kind}_cell")(_cell(_kind))
