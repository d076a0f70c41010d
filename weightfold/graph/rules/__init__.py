"""One small rule per operator; a file per family of operators."""

from weightfold.graph.rules import convolution, moves, placing, pointwise, products, recurrent, reductions, transforms
from weightfold.graph.rules.core import MOVES, RULES, in_place, is_view, node_name, rule, shapes_of, unknown, values_in
from weightfold.graph.rules.dispatch import KNOWN_NUMBERS, apply_rule
from weightfold.graph.rules.numbers import numbers_of

__all__ = [
    "KNOWN_NUMBERS",
    "MOVES",
    "RULES",
    "apply_rule",
    "convolution",
    "in_place",
    "is_view",
    "moves",
    "node_name",
    "numbers_of",
    "placing",
    "pointwise",
    "products",
    "recurrent",
    "reductions",
    "rule",
    "shapes_of",
    "transforms",
    "unknown",
    "values_in",
]
