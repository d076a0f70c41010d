"""In these tests an exception inside an operator's rule is a failure, not a reason to freeze."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from weightfold.graph import exactness
from weightfold.graph.group import ChannelGraph
from weightfold.graph.resize import with_sizes
from weightfold.graph.trace import RULES_MUST_NOT_FAIL, Example, trace


@pytest.fixture(autouse=True)
def rules_must_not_fail() -> Iterator[None]:
    token = RULES_MUST_NOT_FAIL.set(True)
    yield
    RULES_MUST_NOT_FAIL.reset(token)


@pytest.fixture
def graph_of() -> Callable[[nn.Module, Example], ChannelGraph]:
    """Trace a network in float64 with random weights, and check every edit that its graph admits on the network itself:
    random symmetries, planted dead channels, planted duplicates, every output compared."""

    def checked(net: nn.Module, example: Example, *, sizes: bool = True) -> ChannelGraph:
        generator = torch.Generator().manual_seed(0)
        net.double().eval()
        with torch.no_grad():
            for name, tensor in net.state_dict().items():
                if tensor.is_floating_point():
                    tensor.normal_(generator=generator)
                    tensor.abs_().add_(0.5) if name.endswith("running_var") else None
        graph = trace(net, example)
        graph = with_sizes(net, example, graph) if sizes else graph
        for group in graph:
            for check in exactness.check_group(net, graph, group.name, example, generator):
                assert check.error < 1e-9, (check.group, check.kind, check.error, check.problem)
        return graph

    return checked
