"""Rules for LSTM, GRU and plain RNN operators: one hidden unit across gates, layers' weights and time steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weightfold.graph import algebra
from weightfold.graph.labels import FROZEN, READ, WRITE, Field, Store, Value
from weightfold.graph.rules.core import module_path, rule, shapes_of
from weightfold.graph.rules.products import read

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}

GIVEN = "starts from a state that is an input of the model; learn the state as a parameter instead, or start from zeros"


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
        for item in x.fields:
            if len(x.shape) - 1 not in item.support:
                store.freeze(replace(x, fields=(item,)), "is a step or a sample of a recurrent layer")
        result = shapes_of(node)
        directions = 2 if bidirectional else 1
        per_cell = len(params) // (num_layers * directions)
        cells = _cells(params, has_biases, per_cell == 3 + 2 * has_biases)
        _taps(store, node, cells, directions)
        outs: list[Field] = []
        for layer in range(num_layers):
            heads = []
            for cell in cells[layer * directions : (layer + 1) * directions]:
                read(store, x, cell.w_ih)
                heads.append(_unit(store, kind, cell))
            outs += heads
            labels, pos, sgn = (torch.cat(arrays, 2) for arrays in zip(*(h.arrays() for h in heads), strict=True))
            x = _output(x, Field(labels, pos, sgn))
        _rects(store, cells, outs)
        hidden, memory = _stacked(outs), _memory(cells, kind)
        for state, own in zip(hx if isinstance(hx, (list, tuple)) else [hx], (hidden, memory), strict=False):
            _start(store, state, own)
        output = Value(result[0].shape, _fit(x.fields, len(result[0].shape)))
        rest = zip(result[1:], (hidden, memory), strict=False)
        return [output, *(Value(r.shape, own) for r, own in rest)]

    return run


def _start(store: Store, state: Value, own: tuple[Field, ...]) -> None:
    """A state that is given is the unit's value before the first step: one of its channels, or data."""
    last = len(state.shape) - 1
    units = tuple(f for f in state.fields if last in f.support)
    for item in state.fields:
        if item not in units:
            store.flag(item.labels, FROZEN, "numbers the layers or samples of a state")
            store.kill(item)
        elif state.state:
            store.flag(item.labels, WRITE)
    for item in own:
        if not units and state.varies(last):
            store.flag(item.labels, FROZEN, GIVEN)
    for layer in range(state.shape[0] if last == 2 else 1):
        mine, unit = (_of_layer(fields, layer) for fields in (units, own)) if last == 2 else (units, own)
        shape = (1, *state.shape[1:]) if last == 2 else state.shape
        algebra.meet(store, replace(state, shape=shape, fields=mine), Value(shape, unit), "add")


def _of_layer(fields: Sequence[Field], layer: int) -> tuple[Field, ...]:
    """What fields (L, B, H) say of one layer and direction."""
    parts = (f.map(lambda a: a[layer : layer + 1] if a.shape[0] > 1 else a) for f in fields)
    return tuple(part for part in parts if part.support)


def _taps(store: Store, node: torch.fx.Node, cells: Sequence[Cell], directions: int) -> None:
    """Only what the first layer reads is the module's input. What the others read never leaves the operator."""
    path = module_path(node)
    for number, cell in enumerate(cells):
        for weight in (cell.w_ih, cell.w_hh, cell.project):
            if weight is None or weight.name is None:
                continue
            seen = weight is cell.w_ih and number < directions and weight.name.rpartition(".")[0] == path
            store.taps.setdefault((weight.name, 1), set()).add((path or "", -1) if seen else None)


def _stacked(outs: Sequence[Field]) -> tuple[Field, ...]:
    """Labels of the hidden states of all layers and directions, (L, 1, H)."""
    labels, pos, sgn = (torch.cat(arrays, 0) for arrays in zip(*(o.arrays() for o in outs), strict=True))
    item = Field(labels, pos, sgn)
    return (item,) if item.labels.numel() > 1 else ()


def _memory(cells: Sequence[Cell], kind: str) -> tuple[Field, ...]:
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


for _kind in GATES:
    rule(_kind)(_recurrent(_kind))


def _cell(kind: str) -> Any:
    def run(
        store: Store, node: torch.fx.Node, x: Value, hx: Any, w_ih: Value, w_hh: Value, *biases: Value | None
    ) -> Any:
        cell = Cell(w_ih, w_hh, tuple(b for b in biases if b is not None))
        _taps(store, node, [cell], 1)
        read(store, x, w_ih)
        own = _fit((_unit(store, kind, cell),), len(x.shape))
        for state in hx if isinstance(hx, (list, tuple)) else [hx]:
            _start(store, state, own)
        val = node.meta["val"]
        if isinstance(val, (tuple, list)):
            return [Value(tuple(v.shape), own) for v in val]
        return Value(tuple(val.shape), own)

    return run


for _kind in GATES:
    rule(f"{_kind}_cell")(_cell(_kind))
