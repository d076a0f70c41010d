"""What the file of a quantised network will take, header included, before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from weightfold.artifact.coded import CodedTensor
from weightfold.artifact.format import Builder, Structure, differences
from weightfold.artifact.packed import pack, promised_bytes
from weightfold.artifact.packed_header import expected_attributes, in_order
from weightfold.graph.group import ChannelGraph
from weightfold.quant.codes import CodedModel, coded_model
from weightfold.size import unique_state


@dataclass(frozen=True)
class Account:
    """Reckons files of one network, however its channels are cut.

    Args:
        name: of its class.
        shapes: of its tensors before any cut, by name.
        recorded: whether the hash of a ledger stands in its files.

    Example:
        >>> account = Account.of(nn.Linear(4, 2))
        >>> account.name, account.shapes
        ('Linear', {'weight': (2, 4), 'bias': (2,)})
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    recorded: bool = True

    @classmethod
    def of(cls, model: nn.Module, *, recorded: bool = True) -> Account:
        """Of a network as it is now."""
        return cls(type(model).__name__, {n: tuple(v.shape) for n, v in unique_state(model).items()}, recorded)

    def promised_bytes(self, tensors: CodedModel) -> float:
        """Bytes of the file that holds these tensors, header included, without coding it; within a byte or two."""
        return promised_bytes(self._structure(tensors), tensors.coded, tensors.plain)

    def written_bytes(self, tensors: CodedModel) -> int:
        """Bytes of the file that holds these tensors, to the byte: it is made, and thrown away."""
        return len(pack(self._structure(tensors), tensors.coded, tensors.plain)[0])

    def _structure(self, tensors: CodedModel) -> Structure:
        now = {name: tensor.shape for name, tensor in (*tensors.coded.items(), *tensors.plain.items())}
        sizes = differences(self.shapes, now, {})
        builder = Builder(kind="instance", name=self.name)
        follow = tuple(expected_attributes({name: sizes[name] for name in in_order(sizes)}))
        head = "0" * 64 if self.recorded else None
        return Structure(builder=builder, sizes=sizes, attributes=follow, ledger_head=head, fingerprint="")

    def least_bytes(self, model: nn.Module, names: Sequence[str], bias_bits: int, graph: ChannelGraph | None) -> float:
        """The file without any weight: header, biases, norms and buffers, of one channel where channels can be cut.

        Args:
            names: of the quantised parameters.
            bias_bits: bits of biases.
            graph: whose channels may be cut; None: nothing is cut.
        """
        named = dict(model.named_parameters())
        cut = [g for g in graph or () if "remove" in g.admits and g.kind == "channels"]
        short = {a.tensor for g in cut for a in g.axes if graph is not None and len(graph.shapes[a.tensor]) == 1}
        nothing = {n: (torch.zeros(len(named[n])), torch.full((len(named[n]),), 2.0)) for n in names}
        tensors = coded_model(model, nothing, bias_bits)
        coded = dict(tensors.coded)
        for name in names:
            coded[name] = CodedTensor(np.zeros_like(coded[name].codes), coded[name].steps)
        coded |= {n: CodedTensor(t.codes[:1], t.steps[:1]) for n, t in coded.items() if n in short}
        plain = {n: array[:1] if n in short else array for n, array in tensors.plain.items()}
        return self.promised_bytes(replace(tensors, coded=coded, plain=plain))
