"""What a network shares by construction, read off its operators, and how many parameters that saves.

Every operator that uses a parameter uses it at a number of positions of one sample. A convolution applies its kernel at
each pixel of its output, a recurrent layer its matrices at each time step, a linear layer over tokens at each token; a
tensor that stands in several layers, or a module that is called again, is used again. A layer without that sharing has
weights of its own for each use, so with P parameters and u uses sharing saves P (u - 1).

The samples of a batch share everything in every network and are not counted. Shapes are those of the example. Grouped
key and value heads are told by products that are repeated for several query heads before an attention kernel.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from weightfold.graph.trace import Example, arguments, canonical_names, export_program
from weightfold.size import parameters

KINDS: Mapping[str, str] = {
    "space": "the kernel of a convolution at every place",
    "time": "a recurrent layer at every time step",
    "positions": "one matrix or table for every token or place",
    "norm": "one scale and shift for every place",
    "tied": "one tensor in several layers",
    "reuse": "one module called several times",
    "heads": "one key and value head for several query heads",
}
"""Kinds of sharing."""


@dataclass(frozen=True)
class Sharing:
    """One kind of sharing at one place.

    Args:
        kind: one of `KINDS`.
        places: paths of the modules, "" for the model's own forward.
        tensors: names of the parameters that are shared.
        uses: times that each is used in one sample (tied: layers; heads: query heads for one key head).
        parameters: in the shared tensors.
        saved: parameters that a network without this sharing would hold besides.
    """

    kind: str
    places: tuple[str, ...]
    tensors: tuple[str, ...]
    uses: int
    parameters: int
    saved: int


@dataclass(frozen=True)
class Report:
    """All sharing of a network.

    Args:
        rows: in order of the forward pass.
        parameters: unique parameters of the network.
        applied: parameters of a network with weights of its own for every use; grouped heads left as they are.
        unknown: parameters whose use is not understood, with the operator; counted as used once.
    """

    rows: tuple[Sharing, ...]
    parameters: int
    applied: int
    unknown: Mapping[str, str] = field(default_factory=dict)

    def by_kind(self) -> dict[str, int]:
        """Parameters saved by each kind that occurs."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.kind] = found.get(row.kind, 0) + row.saved
        return found


@dataclass(frozen=True)
class _Use:
    """One operator that uses one parameter."""

    tensor: str
    kind: str
    positions: int
    place: str
    cell: bool = False


def sharing(model: nn.Module, example: Example) -> Report:
    """Detect and name what a network shares.

    Args:
        example: what `weightfold.trace` takes; its first dimension is the batch.
    Raises:
        TraceError: the forward fails on the example, or branches on data.
    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 25, 10))
        >>> report = sharing(net, torch.zeros(2, 3, 5, 5))
        >>> [(row.kind, row.places, row.uses, row.saved) for row in report.rows]
        [('space', ('0',), 25, 5184)]
        >>> report.parameters, report.applied
        (2226, 7410)
    """
    program = export_program(model, example)
    args, kwargs = arguments(example)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    given = frozenset(str(name) for name in program.graph_signature.user_inputs)
    batch = max(tensors[0].shape[0], 1) if tensors else 1
    reader = _Reader(_origins(model, program), given, batch, _sizes(model))
    reader.run(program.graph_module)
    rows = tuple(_rows(reader.uses, reader.sizes)) + tuple(reader.heads)
    applied = sum(reader.sizes[use.tensor] * use.positions for use in reader.uses)
    used = {use.tensor for use in reader.uses}
    idle = sum(n for name, n in reader.sizes.items() if name not in used)
    return Report(rows, parameters(model), applied + idle, reader.unknown)


def _sizes(model: nn.Module) -> dict[str, int]:
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def _origins(model: nn.Module, program: torch.export.ExportedProgram) -> dict[str, str]:
    """Placeholder -> name of the parameter, the first of its names."""
    aliases, _ = canonical_names(model)
    signature = program.graph_signature.inputs_to_parameters
    return {node: aliases[name] for node, name in signature.items() if name in aliases}


_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "_convolution"})
_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm"})
_RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu"})
_CELLS = frozenset({"gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell"})
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm"})
_POINTWISE = frozenset({"add", "sub", "mul", "div", "rsub", "prelu"})
_JOINS = frozenset({"cat", "stack", "where"})


class _Reader:
    """Walks the program; knows of each value which parameters alone it was made of."""

    def __init__(self, origins: Mapping[str, str], given: frozenset[str], batch: int, sizes: Mapping[str, int]) -> None:
        self.batch, self.sizes = batch, sizes
        self.uses: list[_Use] = []
        self.heads: list[Sharing] = []
        self.unknown: dict[str, str] = {}
        self._origins, self._given = origins, given
        self._data: set[Node] = set()
        self._made_of: dict[Node, frozenset[str]] = {}

    def run(self, module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "placeholder" and node.name in self._origins:
                self._made_of[node] = frozenset({self._origins[node.name]})
            elif node.op == "placeholder" and node.name in self._given:
                self._data.add(node)
            elif node.op == "call_function":
                self._call(node)

    def _call(self, node: Node) -> None:
        inputs = node.all_input_nodes
        if self._data.intersection(inputs):
            self._data.add(node)
        mine = [source for source in inputs if source in self._made_of]
        name = _operator(node)
        if mine and len(mine) == len(inputs) and name not in _PRODUCTS - {"linear"}:
            self._made_of[node] = frozenset().union(*(self._made_of[source] for source in mine))
        elif mine:
            self._use(node, name, mine)
        if name == "scaled_dot_product_attention":
            self.heads += self._grouped_heads(node)

    def _use(self, node: Node, name: str, sources: list[Node]) -> None:
        place, tensors = _place(node), sorted({t for source in sources for t in self._made_of[source]})
        for tensor in tensors:
            source = next(s for s in sources if tensor in self._made_of[s])
            kind, positions = self._positions(node, name, source, tensor)
            if kind == "":
                self.unknown[tensor] = str(node.target)
            self.uses.append(_Use(tensor, kind, max(positions // self.batch, 1), place, name in _CELLS))

    def _positions(self, node: Node, name: str, source: Node, tensor: str) -> tuple[str, int]:
        """Kind of use, and places of the whole batch at which it happens."""
        if name in _CONVOLUTIONS | _TRANSPOSED:
            map_ = _shape(node.args[0]) if name in _TRANSPOSED else _shape(node)
            channels = map_[1] if len(map_) > 2 else 1
            return "space", math.prod(map_) // channels
        if name in _RECURRENT:
            sequence = _shape(node.args[0])
            return "time", math.prod(sequence[:-1])
        if name in _CELLS:
            return "time", self.batch
        if name in _PRODUCTS:
            return "positions", self._product(node, name, source)
        if name == "embedding":
            looked_up = node.args[1] in self._data  # else a table of places, each row of which has one place
            return "positions", math.prod(_shape(node.args[1])) if looked_up else self.batch
        if name in _NORMS or name in _POINTWISE:
            data = max((_shape(n) for n in node.all_input_nodes), key=math.prod)
            return "norm" if name in _NORMS else "positions", math.prod(data) // max(self.sizes[tensor], 1)
        return ("positions" if name in _JOINS else ""), self.batch

    def _product(self, node: Node, name: str, source: Node) -> int:
        """Times that a matrix is multiplied with a vector; biases go with the output's rows."""
        out, own = _shape(node), _shape(source)
        left, right = node.args[1:3] if name in ("addmm", "baddbmm") else node.args[:2]
        if name == "linear" or source not in (left, right) or len(own) < 2:
            return math.prod(out) // out[-1]
        inner = own[-1] if source is left else own[-2]
        return math.prod(out) * inner // math.prod(own)

    def _grouped_heads(self, node: Node) -> Iterator[Sharing]:
        """Key and value projections whose rows serve several query heads each."""
        query = _shape(node.args[0])
        for operand in node.args[1:3]:
            product = _behind(operand, self._made_of)
            width = query[-3] * _shape(operand)[-1]
            if product is None or width % _shape(product)[-1] or width == _shape(product)[-1]:
                continue
            names = {t for s in product.all_input_nodes for t in self._made_of.get(s, ())}
            tensors, uses = tuple(sorted(names)), width // _shape(product)[-1]
            n = sum(self.sizes[t] for t in tensors)
            yield Sharing("heads", (_place(product),), tensors, uses, n, n * (uses - 1))


def _operator(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.rstrip("_") if packet is not None else getattr(node.target, "__name__", "")


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    value = value[0] if isinstance(value, tuple | list) and value else value
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def _place(node: Node) -> str:
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack") or {}
    return next(reversed(list(stack.values())), ("", ""))[0]


def _behind(operand: Any, made_of: Mapping[Node, Any]) -> Node | None:
    """The one product with a parameter that an operand comes from, through moves and pointwise operators."""
    queue, seen, found = [operand], set(), []
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if any(source in made_of for source in node.all_input_nodes) and _operator(node) in _PRODUCTS:
            found.append(node)
        elif node.target is not operator.getitem or len(node.all_input_nodes) == 1:
            queue += node.all_input_nodes
    return found[0] if len(found) == 1 else None


# rows -----------------------------------------------------------------------------------------------------------------


def _rows(uses: Sequence[_Use], sizes: Mapping[str, int]) -> Iterator[Sharing]:
    """Tensors that are shared alike come together."""
    by_tensor: dict[str, list[_Use]] = {}
    for use in uses:
        by_tensor.setdefault(use.tensor, []).append(use)
    found: dict[tuple[Any, ...], list[str]] = {}
    for tensor, mine in by_tensor.items():
        for key in _kinds(mine):
            found.setdefault(key, []).append(tensor)
    for (kind, places, n_uses, factor), tensors in found.items():
        n = sum(sizes[t] for t in tensors)
        yield Sharing(kind, places, tuple(tensors), n_uses, n, n * factor)


def _kinds(uses: list[_Use]) -> Iterator[tuple[str, tuple[str, ...], int, int]]:
    """Kind, places, uses and copies saved, of one tensor: at positions, in several layers, by several calls."""
    places = tuple(dict.fromkeys(use.place for use in uses))
    for place in places:
        for use in {u.kind: u for u in uses if u.place == place and u.positions > 1}.values():
            same = [u for u in uses if u.place == place and u.kind == use.kind]
            yield use.kind, (place,), use.positions, sum(u.positions - 1 for u in same)
    if len(places) > 1:
        yield "tied", places, len(places), len(places) - 1
    for place in places:
        calls = sum(use.place == place for use in uses)
        if calls > 1:
            cell = any(use.cell for use in uses)
            yield "time" if cell else "reuse", (place,), calls, calls - 1
