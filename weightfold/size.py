"""The only place that counts: parameters, bytes of the file, multiply-accumulates.

Multiply-accumulates (MACs) are counted by the operators that run, on tensors without storage: linear, convolution,
matrix product, attention and recurrent layers, as modules or as functions. Additions, norms and activations count
nothing. Each product is charged to the parameter it multiplies, so the MACs at other widths follow without running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from weightfold.errors import TraceError, WeightfoldError
from weightfold.graph import edit as edits
from weightfold.graph.apply import apply
from weightfold.graph.group import ChannelGraph, ChannelGroup
from weightfold.graph.trace import Example, arguments, meta_tensor, structural_copy


@dataclass(frozen=True)
class Sizes:
    """How large a network is.

    Args:
        parameters: unique parameters, tied ones once.
        size_bytes: of the safetensors file.
        macs: multiply-accumulates of one call on the example.
    """

    parameters: int
    size_bytes: int
    macs: int

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Sizes:
        """Measure a model.

        Example:
            >>> Sizes.of(nn.Linear(4, 8), torch.zeros(1, 4))
            Sizes(parameters=40, size_bytes=296, macs=32)
        """
        return cls(parameters(model), size_bytes(model), macs(model, example))


# parameters and bytes -------------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> int:
    """Count the unique parameters; tied ones count once.

    Example:
        >>> a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        >>> b.weight = a.weight
        >>> parameters(nn.Sequential(a, b))
        16
    """
    return sum(parameter.numel() for parameter in model.parameters())


def unique_values(model: nn.Module) -> int:
    """Count the distinct values of every parameter, added up; tied parameters count once.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> _ = [nn.init.constant_(p, 1.0) for p in layer.parameters()]
        >>> unique_values(layer)
        2
    """
    return sum(int(parameter.detach().unique().numel()) for parameter in model.parameters())


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with every tensor under the first of its names only, as a safetensors file can hold it."""
    seen: set[tuple[Any, ...]] = set()
    out = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        alias = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if alias not in seen or value.numel() == 0:
            seen.add(alias)
            out[name] = value
    return out


def size_bytes(model: nn.Module) -> int:
    """Bytes of the file that `safetensors.torch.save` makes of `unique_state(model)`, without making it.

    Example:
        >>> from safetensors.torch import save
        >>> model = nn.Linear(3, 2)
        >>> size_bytes(model) == len(save(model.state_dict()))
        True
    """
    return file_bytes(unique_state(model))


_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file: 8 for a length, a JSON header padded to a multiple of 8, the tensors end to end.

    The format puts wider types first, and names in order; this matters, as offsets are written out in digits.
    """
    rank = {dtype: k for k, dtype in enumerate(_DTYPES)}
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), -rank[item[1].dtype], item[0]))
    header, end = {}, 0
    for name, value in order:
        start, end = end, end + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


# multiply-accumulates -------------------------------------------------------------------------------------------------


@dataclass
class MacCount:
    """MACs of one call, by operator and by the parameter that is multiplied.

    Args:
        by_operator: MACs by operator name.
        by_tensor: MACs by parameter name; products of two activations (attention) are not among them.
    """

    by_operator: dict[str, int] = field(default_factory=dict)
    by_tensor: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_operator.values())

    @property
    def loose(self) -> int:
        """MACs that multiply no parameter."""
        return self.total - sum(self.by_tensor.values())

    def add(self, operator: str, tensor: str | None, n_macs: int) -> None:
        self.by_operator[operator] = self.by_operator.get(operator, 0) + n_macs
        if tensor is not None:
            self.by_tensor[tensor] = self.by_tensor.get(tensor, 0) + n_macs


_FUSED_RECURRENT = {torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn, torch.ops.aten.miopen_rnn}


class _Counting(TorchDispatchMode):
    """Adds up the MACs of every product that is dispatched inside."""

    def __init__(self, owner_of_storage: Mapping[int, str], count: MacCount) -> None:
        super().__init__()
        self.owners = owner_of_storage
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            self.count.add(packet.__name__, self._parameter(args), flops // 2)
        elif packet in _FUSED_RECURRENT:
            self._add_recurrent(packet.__name__, args)
        return out

    def _add_recurrent(self, name: str, args: Any) -> None:
        """A fused recurrent layer multiplies each of its matrices once a sample and time step."""
        x, *rest = (leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor))
        for weight in rest:
            owner = self._parameter((weight,))
            if owner is not None:
                self.count.add(name, owner, x.numel() // x.shape[-1] * weight.numel())

    def _parameter(self, args: Any) -> str | None:
        """The first parameter with more than one dimension among the arguments, views included."""
        matrices = (leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.ndim > 1)
        names = (self.owners.get(leaf.untyped_storage()._cdata) for leaf in matrices)
        return next((name for name in names if name is not None), None)


def count_macs(model: nn.Module, example: Example) -> MacCount:
    """Count the MACs of one call on the example.

    The call runs in evaluation mode on a copy without storage; where a network looks at numbers to decide what to do,
    on a copy with them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 25, 10))
        >>> count = count_macs(net, torch.zeros(1, 3, 5, 5))
        >>> count.total == 25 * 8 * 3 * 9 + 200 * 10, count.by_tensor
        (True, {'0.weight': 5400, '2.weight': 2000})
    """
    try:
        return _count(structural_copy(model, meta_tensor), *_to_meta(example))
    except (RuntimeError, NotImplementedError, TypeError):
        try:
            return _count(structural_copy(model, lambda t: t.detach().clone()), *arguments(example))
        except Exception as error:
            raise TraceError(
                f"The MACs of '{type(model).__name__}' cannot be counted: its forward fails on the example: {error}",
                remedy="Pass an example that the model accepts.",
            ) from error


def macs(model: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one call on the example (all its samples together)."""
    return count_macs(model, example).total


def _to_meta(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments(example))


def _count(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> MacCount:
    owners = {p.untyped_storage()._cdata: name for name, p in twin.named_parameters()}
    count = MacCount()
    devices = {p.device for p in twin.parameters()}
    with _unfused(next(iter(devices), torch.device("cpu"))), _Counting(owners, count):
        twin.eval()(*args, **kwargs)
    return count


@contextmanager
def _unfused(device: torch.device) -> Iterator[None]:
    """Keep gradients, the attention kernel that hides its products, and the random state out of the count."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device.type == "meta":
            stack.enter_context(device)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


# multiply-accumulates at other widths ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MacModel:
    """MACs as a function of the groups' widths.

    A parameter's MACs are in proportion to its size, and its size follows the widths along each dimension. Products
    of activations are charged to the channels by what one channel (of every block) saves.

    Args:
        graph: the channel graph.
        count: the MACs as they are.
        loose: MACs of products of activations that one channel of a group carries, by group name.
    """

    graph: ChannelGraph
    count: MacCount
    loose: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph, example: Example) -> MacModel:
        """Measure a model at its present widths."""
        count = count_macs(model, example)
        return cls(graph, count, _loose(model, graph, example, count) if count.loose else {})

    @property
    def total(self) -> int:
        """MACs at the present widths."""
        return self.count.total

    def at(self, widths: Mapping[str, int]) -> float:
        """MACs when some groups have other widths.

        Args:
            widths: channels left, by group name; groups not named keep theirs.
        """
        dropped = {name: self.graph[name].n_channels - width for name, width in widths.items()}
        lost: dict[str, dict[int, float]] = {}
        for name, n in dropped.items():
            for axis in self.graph[name].axes:
                if axis.tensor in self.count.by_tensor:
                    share = n * _positions(axis.index) / axis.size
                    table = lost.setdefault(axis.tensor, {})
                    table[axis.dim] = table.get(axis.dim, 0.0) + share
        saved = sum(self._saved(tensor, shares) for tensor, shares in lost.items())
        return self.total - saved - sum(self.loose.get(name, 0.0) * n for name, n in dropped.items())

    def _saved(self, tensor: str, lost: Mapping[int, float]) -> float:
        kept = math.prod(1 - share for share in lost.values())
        return self.count.by_tensor[tensor] * (1 - kept)

    def per_channel(self) -> dict[str, float]:
        """MACs that the network loses with one channel of each group."""
        return {g.name: self.total - self.at({g.name: g.n_channels - 1}) for g in self.graph}


def _positions(index: Tensor) -> float:
    """Positions along an axis that one channel takes, on average."""
    return float((index >= 0).sum()) / index.shape[0]


def macs_per_channel(model: nn.Module, graph: ChannelGraph, example: Example) -> dict[str, float]:
    """MACs that the network loses with one channel of each group: its rows where it is written, its columns where read.

    Example:
        >>> import weightfold as wf
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> macs_per_channel(net, wf.trace(net, torch.zeros(1, 4)), torch.zeros(1, 4))
        {'0': 6.0}
    """
    return MacModel.of(model, graph, example).per_channel()


def _loose(model: nn.Module, graph: ChannelGraph, example: Example, count: MacCount) -> dict[str, float]:
    """What each channel carries of the products of activations, measured by removing one of every block."""
    out = {}
    for group in graph:
        if "remove" not in group.admits:
            continue
        n_blocks = 1 if group.block is None else int(group.block.max()) + 1
        twin = structural_copy(model, meta_tensor)
        try:
            apply(twin, graph, edits.remove(group, _all_but_one(group)))
            out[group.name] = (count.loose - count_macs(twin, example).loose) / n_blocks
        except WeightfoldError:
            continue  # it is the gate's to refuse such an edit; here it only has no price
    return out


def _all_but_one(group: ChannelGroup) -> Tensor:
    """Every channel but the last of each block."""
    block = torch.zeros(group.n_channels, dtype=torch.long) if group.block is None else group.block
    keep = torch.ones(group.n_channels, dtype=torch.bool)
    for b in range(int(block.max()) + 1):
        keep[(block == b).nonzero()[-1]] = False
    return keep.nonzero().flatten()
