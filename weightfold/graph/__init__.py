"""The channel graph: what of a model is a channel, and the edits that are exact on it."""

from weightfold.graph.group import Axis, ChannelGraph, ChannelGroup, Frozen, Gauge
from weightfold.graph.trace import trace

__all__ = ["Axis", "ChannelGraph", "ChannelGroup", "Frozen", "Gauge", "trace"]
