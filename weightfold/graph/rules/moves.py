"""Rules of operators that move data: labels move along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weightfold.graph import algebra
from weightfold.graph.labels import (
    FOREIGN,
    FROZEN,
    NO_MERGE,
    NO_REMOVE,
    UNIFORM,
    ZERO,
    Field,
    Store,
    Value,
    compress,
    kept,
)
from weightfold.graph.rules.core import call, node_name, on, out_shape, rule, unknown, values_in


@rule(
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "view_as",
    "reshape_as",
    move=True,
)
def view(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    return algebra.reshape(store, x, out_shape(node))


@rule("clone", "contiguous", "alias", "detach", "to", "_to_copy", "lift_fresh_copy", "type_as", "float", "double",
      "half", "dropout", "feature_dropout", "alpha_dropout", "native_dropout", "requires_grad", "positive", "bernoulli",
      "convert_element_type", "lift", move=True)  # fmt: skip
def same(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Any:
    return [x, Value(x.shape)] if isinstance(node.meta.get("val"), (tuple, list)) else x


@rule("permute", "transpose", "t", "movedim", "swapaxes", "swapdims", "numpy_T", "mT", "mH", "matrix_H",
      "moveaxis", "adjoint", move=True)  # fmt: skip
def reorder(store: Store, node: torch.fx.Node, x: Value, *args: Any, **_: Any) -> Value:
    probe = [1] * len(x.shape)
    order: list[int] = []
    for d in range(len(x.shape)):
        probe[d] = 2
        order.append(list(call(node, torch.empty(probe, device="meta"), *args).shape).index(2))
        probe[d] = 1
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return algebra.permute(x, inverse)


@rule("expand", "expand_as", "broadcast_to", move=True)
def expand(store: Store, node: torch.fx.Node, x: Value, *_: Any, **__: Any) -> Value:
    shape = out_shape(node)
    wide = x.lifted(len(shape))
    if not x.fields:
        return wide
    repeats = [algebra.repeat(shape, d) for d, n in enumerate(shape) if wide.shape[d] == 1 < n]
    return replace(wide, shape=shape, fields=(*wide.fields, *repeats), name=None)


def along(store: Store, node: torch.fx.Node, x: Value, dim: int, args: tuple, kwargs: dict, index: int | None) -> Value:
    """Run a movement along one dimension on the labels that vary there; other labels pass."""
    shape = out_shape(node, index)
    gone = len(shape) < len(x.shape)
    fields = []
    for item in x.fields:

        def run(array: Tensor) -> Tensor:
            full = [x.shape[dim] if d == dim else n for d, n in enumerate(array.shape)]
            out = call(node, array.expand(full), *args, **kwargs)
            return out if index is None else out[index]

        if dim in item.support:
            fields += kept(store, item.map(run))
        elif 0 not in shape:
            fields.append(item.map(lambda array: array.squeeze(dim)) if gone else item)
    return replace(x, shape=shape, fields=tuple(fields), name=None)


@rule("slice", "narrow", "index_select", "roll", "unfold", move=True)
def cut(store: Store, node: torch.fx.Node, x: Value, dim: int = 0, *args: Any, **kwargs: Any) -> Value:
    if (
        isinstance(dim, (list, tuple))
        or any(isinstance(a, Value) for a in args)
        or kwargs
        or node_name(node)
        in (
            "roll",
            "unfold",
        )
    ):
        return execute(store, node, x, dim, *args, **kwargs)
    d = on(x, dim)
    return along(store, node, x, d, (d, *args), {}, None)


@rule("select", move=True)
def select(store: Store, node: torch.fx.Node, x: Value, dim: int, index: int) -> Value:
    d = on(x, dim)
    return along(store, node, x, d, (d, index), {}, None)


@rule("unbind", move=True)
def unbind(store: Store, node: torch.fx.Node, x: Value, dim: int = 0) -> list[Value]:
    d = on(x, dim)
    return [along(store, node, x, d, (d,), {}, i) for i in range(x.shape[d])]


@rule("split", "chunk", "split_with_sizes", "tensor_split", move=True)
def split(store: Store, node: torch.fx.Node, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    d = on(x, dim)
    parts = [along(store, node, x, d, (sizes, d), {}, i) for i in range(len(node.meta["val"]))]
    lengths = {part.shape[d] for part in parts}
    if len(lengths) == 1 and len(parts) > 1 and not x.raw:
        for item in x.fields:
            if item.level == 0 and d in item.support:
                shape = [x.shape[d] if i == d else n for i, n in enumerate(item.labels.shape)]
                labels = item.labels.expand(shape).movedim(d, -1)
                store.rect(labels.reshape(*labels.shape[:-1], len(parts), -1))
    return parts


@rule("repeat", "tile", "flip", "pixel_shuffle", "pixel_unshuffle",
      "repeat_interleave", "rot90", "diagonal", move=True)  # fmt: skip
def execute(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Run any movement on the fully expanded labels; data-dependent indices must not touch labelled dimensions."""
    shape = out_shape(node)
    if any(isinstance(a, Value) for a in args):
        return indexed(store, node, x, *args, **kwargs)
    if node_name(node) == "repeat" and all(
        a == b or a == 1 for a, b in zip(x.lifted(len(shape)).shape, shape, strict=True)
    ):
        return expand(store, node, x)
    return algebra.moved(store, x, shape, lambda array: call(node, array, *args, **kwargs))


@rule("channel_shuffle", "native_channel_shuffle", move=True)
def channel_shuffle(store: Store, node: torch.fx.Node, x: Value, groups: int) -> Value:
    """Channels as a table of groups, turned round."""
    rest = x.shape[2:]
    table = algebra.reshape(store, x, (x.shape[0], groups, x.shape[1] // groups, *rest))
    turned = algebra.permute(table, (0, 2, 1, *range(3, 3 + len(rest))))
    return algebra.reshape(store, turned, x.shape)


@rule("as_strided", move=True)
def as_strided(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Windows over memory: labels are laid out as the tensor itself was."""
    strides = node.args[0].meta["val"].stride()  # type: ignore[union-attr]

    def windows(array: Tensor) -> Tensor:
        memory = torch.empty_strided(x.shape, strides, dtype=array.dtype).copy_(array)
        return torch.as_strided(memory, *args, **kwargs).clone()

    return algebra.moved(store, x, out_shape(node), windows)


@rule("index", "gather", "take_along_dim", "_unsafe_index", move=True)
def indexed(store: Store, node: torch.fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Indexing: labels move along indices that are known, and elsewhere pass where the indices make no difference."""
    shape = out_shape(node)
    indices = values_in(args)
    for a in indices:
        store.freeze(a, "is used as an index")

    def fill(a: Any, val: Any, constant: int | None) -> Any:
        if isinstance(a, Value):
            return a.known if constant is None else torch.full(tuple(val.shape), constant, dtype=torch.long)
        return [fill(b, v, constant) for b, v in zip(a, val, strict=True)] if isinstance(a, (list, tuple)) else a

    vals = pytree.tree_map_only(torch.fx.Node, lambda n: n.meta["val"], list(node.args[1:]))

    def pick(item: Field, constant: int | None) -> Field:
        filled = fill(list(args), vals, constant)
        return item.map(lambda array: call(node, array.expand(x.shape), *filled, **kwargs))

    if not x.raw and indices and all(a.known is not None for a in indices):
        fields = [small for item in x.fields for small in kept(store, pick(item, None))]
        return Value(shape, tuple(fields), state=x.state, computed=x.computed)

    fields = []
    for item in x.fields:
        low = high = None
        for other in (-1, 1):
            try:
                low, high = pick(item, 0), pick(item, other)
                break
            except (RuntimeError, IndexError):
                continue
        if (
            low is None
            or high is None
            or low.labels.shape != torch.Size(shape)
            or bool((low.labels != high.labels).any())
        ):
            store.forbid(x, item, item.support, FROZEN, "is picked by data")
            continue
        fields += kept(store, low)
    return Value(shape, tuple(fields), state=x.state)


@rule("cat", "concat", "concatenate", move=True)
def cat(store: Store, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> Value:
    shape = out_shape(node)
    d = on(max(parts, key=lambda p: len(p.shape)), dim)
    parts = [p for p in parts if 0 not in p.shape] or list(parts)
    fields = []
    for level in (0, 1):
        item = _joined(store, parts, d, level)
        fields += [item] if item is not None else []
    thin = [_without(part, d) for part in parts]
    rest = thin[0]
    for part in thin[1:]:
        rest = algebra.meet(store, rest, part, "add")
    return Value(
        shape,
        tuple(fields) + rest.fields,
        state=all(p.state for p in parts),
        computed=all(p.state for p in parts),
        uniform=all(p.zero for p in parts),
        zero=all(p.zero for p in parts),
    )


@rule("copy", move=True)
def copy(store: Store, node: torch.fx.Node, x: Value, source: Value, *_: Any) -> Value:
    """What was there is gone."""
    return expand(store, node, source)


@rule("select_scatter", "slice_scatter", move=True)
def scatter(store: Store, node: torch.fx.Node, x: Value, part: Value, dim: int = 0, *args: Any, **kwargs: Any) -> Value:
    """A stretch along one dimension is replaced: the rest before it, the part, the rest behind it."""
    d = on(x, dim)
    n = x.shape[d]
    if node_name(node) == "select_scatter":
        part = algebra.reshape(store, part, (*part.shape[:d], 1, *part.shape[d:]))
        start, end = args[0] % n, args[0] % n + 1
    else:
        start, end, step = (*args, None, None, None)[:3]
        start, end, step = slice(start, end, step).indices(n)
        if step != 1:
            return unknown(store, node, x, part)
    if not any(d in item.support for item in part.fields):
        for item in x.fields:
            for bit in (NO_REMOVE, NO_MERGE) if d in item.support else ():
                store.forbid(x, item, frozenset({d}), bit, "is overwritten at fixed positions across the group")
    parts = [_stretch(store, x, d, 0, start), part, _stretch(store, x, d, end, n)]
    return cat(store, node, [p for p in parts if p.shape[d]], d)


def _stretch(store: Store, x: Value, d: int, start: int, end: int) -> Value:
    shape = tuple(end - start if i == d else n for i, n in enumerate(x.shape))

    def cut(item: Field) -> list[Field]:
        full = [x.shape[i] if i == d else n for i, n in enumerate(item.labels.shape)]
        piece = item.map(lambda a: a.expand(full).narrow(d, start, end - start))
        return kept(store, piece) if d in item.support else [item]

    return replace(x, shape=shape, fields=tuple(f for item in x.fields for f in cut(item)), name=None)


def _without(part: Value, d: int) -> Value:
    shape = tuple(1 if i == d else n for i, n in enumerate(part.shape))
    return replace(part, shape=shape, fields=tuple(f for f in part.fields if d not in f.support), name=None)


def _joined(store: Store, parts: Sequence[Value], d: int, level: int) -> Field | None:
    """The field of a concatenation along ``d``: every part's labels, constants where a part has none."""
    found = [[f for f in part.fields if f.level == level and d in f.support] for part in parts]
    codes = [ZERO if part.zero else UNIFORM if part.uniform else FOREIGN for part in parts]
    told_apart = level == 0 and len(set(codes)) > 1  # an input beside zeros: what reads the zeros is not bound to it
    if (not any(found) and not told_apart) or (level == 1 and not all(found)):
        for part, fs in zip(parts, found, strict=True):
            told = any(f.level == 0 and d in f.support for f in part.fields)
            for lost in () if told else fs:
                store.flag(lost.labels, FROZEN, "is concatenated with what is not laid out in such blocks")
                store.kill(lost)
        return None
    for extra in (f for fs in found for f in fs[1:]):
        store.flag(extra.labels, FROZEN, "is concatenated in more than one way")
        store.kill(extra)
    ndim = len(parts[0].shape)
    others = torch.broadcast_shapes(
        (1,) * ndim, *(tuple(1 if i == d else n for i, n in enumerate(fs[0].labels.shape)) for fs in found if fs)
    )
    columns: list[list[Tensor]] = [[], [], []]
    for part, fs, code in zip(parts, found, codes, strict=True):
        shape = tuple(part.shape[d] if i == d else others[i] for i in range(ndim))
        none = torch.zeros(shape, dtype=torch.long)
        arrays = fs[0].arrays() if fs else (none + code, none, none)
        for column, array in zip(columns, arrays, strict=True):
            column.append(array.expand(shape))
    labels, pos, sgn = (torch.cat(column, d) for column in columns)
    if len(_numbers_beside(parts, columns[0])) > 1:
        labels = labels.masked_fill(labels == UNIFORM, FOREIGN)  # what reads one of them cannot read another
    loud, curved = (any(getattr(f, kind) for fs in found for f in fs) for kind in ("loud", "curved"))
    return compress(Field(labels, pos, sgn, level, loud, curved))


def _numbers_beside(parts: Sequence[Value], labels: Sequence[Tensor]) -> set[Any]:
    """The numbers with which a concatenation is filled up; an unknown one counts as one of its own."""
    out: set[Any] = set()
    for place, (part, column) in enumerate(zip(parts, labels, strict=True)):
        out |= {0.0} if bool((column == ZERO).any()) else set()
        if bool((column == UNIFORM).any()):
            known = part.uniform and part.known is not None and part.known.numel()
            out.add(float(part.known.flatten()[0]) if known and part.known is not None else ("unknown", place))
    return out


@rule("stack", move=True)
def stack(store: Store, node: torch.fx.Node, parts: Sequence[Value], dim: int = 0) -> Value:
    d = dim % (len(parts[0].shape) + 1)
    lifted = [algebra.reshape(store, p, (*p.shape[:d], 1, *p.shape[d:])) for p in parts]
    pairs = [[f for f in p.fields if f.level == 0] for p in lifted]
    if any(len(fs) != 1 for fs in pairs):
        return cat(store, node, lifted, d)
    shapes = torch.broadcast_shapes(*(fs[0].labels.shape for fs in pairs))
    arrays = [torch.cat([getattr(fs[0], kind).expand(shapes) for fs in pairs], d) for kind in ("labels", "pos", "sgn")]
    loud, curved = (any(getattr(fs[0], kind) for fs in pairs) for kind in ("loud", "curved"))
    item = compress(Field(arrays[0], arrays[1], arrays[2], loud=loud, curved=curved))
    rest = cat(store, node, [replace(p, fields=p.blocks()) for p in lifted], d)
    return replace(rest, fields=rest.fields + ((item,) if item is not None else ()), state=all(p.state for p in parts))


@rule("pad_sequence", move=True)
def pad_sequence(
    store: Store,
    node: torch.fx.Node,
    parts: Sequence[Value],
    batch_first: bool = False,
    padding: float = 0.0,
    *_: Any,
    **__: Any,
) -> Value:
    """Sequences (T, ...) of many lengths side by side: each step is a sample."""
    rest: Value | None = None
    for part in parts:
        steps = Value((1, *part.shape[1:]), tuple(f for f in part.fields if 0 not in f.support), part.state)
        store.freeze(replace(part, fields=tuple(f for f in part.fields if 0 in f.support)), "is padded")
        rest = steps if rest is None else algebra.meet(store, rest, steps, "add")
    assert rest is not None
    if padding:
        ended = Value((1,) * len(rest.shape), uniform=True)
        rest = algebra.meet(store, rest, ended, "none")
    fields = tuple(f.map(lambda a: a.unsqueeze(0)) for f in rest.fields)
    return Value(out_shape(node), fields)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
      "replication_pad2d", "replication_pad3d", move=True)  # fmt: skip
def pad(store: Store, node: torch.fx.Node, x: Value, pads: Sequence[int], *rest: Any, **kwargs: Any) -> Value:
    shape = out_shape(node)
    ndim = len(x.shape)
    padded = {ndim - 1 - i // 2 for i, n in enumerate(pads) if n}
    name = node_name(node)
    constant = name == "constant_pad_nd" or (
        name == "pad" and (rest[0] if rest else kwargs.get("mode", "constant")) == "constant"
    )
    number = (
        (rest[0] if rest else kwargs.get("value", 0))
        if name == "constant_pad_nd"
        else (rest[1] if len(rest) > 1 else kwargs.get("value"))
    )
    code = UNIFORM if number else ZERO
    fields = []
    for item in x.fields:
        if not item.support & padded:
            fields.append(item)
            continue
        if not constant:
            store.forbid(x, item, item.support, FROZEN, "is padded with copies of its neighbours")
            continue
        if code == UNIFORM:
            store.kill(item)
            item = item.without_gauge()
        wide = [n if d in padded else item.labels.shape[d] for d, n in enumerate(x.shape)]
        run = [0 if ndim - 1 - i // 2 not in padded else n for i, n in enumerate(pads)]
        arrays = [
            torch.constant_pad_nd(a.expand(wide), run, value)
            for a, value in zip(item.arrays(), (code, 0, 0), strict=True)
        ]
        fields += kept(store, replace(item, labels=arrays[0], pos=arrays[1], sgn=arrays[2]))
    return Value(shape, tuple(fields), state=x.state, zero=x.zero and code == ZERO, uniform=x.zero and code == ZERO)
