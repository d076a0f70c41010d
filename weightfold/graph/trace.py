"""Trace any `nn.Module` into a `ChannelGraph`.

`export` gives the operators; `rules` say what each does to channels; `build` takes the connected components. Nothing of
the model is touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from weightfold.errors import TraceError
from weightfold.graph import algebra, rules
from weightfold.graph.build import Builder
from weightfold.graph.copies import flush_caches, meta_tensor, structural_copy
from weightfold.graph.export import Example, arguments, export_program, quiet, refuse_unready, runs
from weightfold.graph.failures import source_line, user_line
from weightfold.graph.group import ChannelGraph
from weightfold.graph.labels import Store, Value
from weightfold.graph.paths import in_mode, other_mode, without_unrun
from weightfold.graph.solve import OUTPUT, solve

__all__ = [
    "Example",
    "arguments",
    "canonical_names",
    "export_program",
    "flush_caches",
    "meta_tensor",
    "quiet",
    "structural_copy",
    "trace",
    "user_line",
]

RULES_MUST_NOT_FAIL: ContextVar[bool] = ContextVar("RULES_MUST_NOT_FAIL", default=False)
"""Let an exception inside a rule through instead of freezing what the operator meets: set by the tests."""


def canonical_names(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Alias -> first name of every parameter and persistent floating buffer, and the tensors by first name."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    transient = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
    }
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if name in transient or not tensor.is_floating_point():
            continue
        aliases[name] = first.setdefault(id(tensor), name)
        tensors.setdefault(aliases[name], tensor)
    return aliases, tensors


class Interpreter:
    """Runs an exported program on labels."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.where: list[str] = []
        self.operators: list[str] = []
        self.constants: list[float] = []

    def run(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
        env: dict[torch.fx.Node, Any] = {}
        queue = iter(inputs)
        for node in module.graph.nodes:
            self.where.append(source_line(node) if node.op == "call_function" else "")
            self.store.node = len(self.where) - 1
            if node.op == "placeholder":
                env[node] = next(queue)
            elif node.op == "get_attr":
                env[node] = getattr(module, str(node.target), None)
                if isinstance(env[node], Tensor):
                    env[node] = Value(tuple(env[node].shape))
            elif node.op == "call_function":
                env[node] = self._call(node, env)
            elif node.op == "output":
                out = pytree.tree_map_only(torch.fx.Node, lambda n: env[n], node.args[0])
                return list(pytree.tree_leaves(out))
        return []

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        def get(a: Any) -> Any:
            return pytree.tree_map_only(torch.fx.Node, lambda n: env[n], a)

        args, kwargs = get(list(node.args)), get(dict(node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (list, tuple)) else args[0]
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._higher_order(node, args, kwargs)
        self.operators.append(str(node.target))
        result = self._apply(node, args, kwargs)
        self.constants += rules.numbers_of(node, [*args, *kwargs.values()], result)
        if rules.in_place(node) and node.args:
            self._written(node.args[0], env, args, result)
        if "out" in node.kwargs:
            self._written(node.kwargs["out"], env, args, result)
        return result

    def _apply(self, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator's rule; a call that the rule does not foresee freezes what it meets."""
        try:
            return rules.apply_rule(self.store, node, args, kwargs)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
            if RULES_MUST_NOT_FAIL.get():
                raise
            text = f"'{node.target}' is called in a way its rule does not know ({type(error).__name__})"
            for value in rules.values_in([*args, *kwargs.values()]):
                self.store.freeze(value, text)
            return rules.shapes_of(node)

    def _higher_order(self, node: torch.fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """A block under no_grad or autocast runs like the rest; other control flow freezes what it meets."""
        name = getattr(node.target, "__name__", str(node.target))
        inner = next((a for a in args if isinstance(a, torch.fx.GraphModule)), None)
        if inner is not None and name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            at = next(i for i, a in enumerate(args) if a is inner)
            return self.run(inner, args[at + 1 :])
        if not any(v.fields for v in rules.values_in(args)):
            return rules.shapes_of(node)
        return rules.unknown(self.store, node, *args, **kwargs)

    def _written(self, target: Any, env: dict[torch.fx.Node, Any], args: list[Any], result: Any) -> None:
        """An in-place operator changes what later users of its target see.

        A buffer keeps what is written into it for the next forward: its channels are those of the new values.
        """
        if not isinstance(target, torch.fx.Node) or not isinstance(env.get(target), Value):
            return
        if env[target].known is not None:
            _forget_numbers(env)
        if env[target].name is not None and isinstance(result, Value):
            algebra.meet(self.store, env[target], result, "none")
        env[target] = result
        base, unary = target, len(rules.values_in(args)) == 1
        while base.op == "call_function" and rules.is_view(base) and isinstance(base.args[0], torch.fx.Node):
            step, base = base, base.args[0]
            old = env.get(base)
            if not isinstance(old, Value):
                continue
            if not unary and old.name is None and not _seen_by_others(base, step):
                continue
            if unary:
                for item in old.fields:
                    self.store.kill(item)
                fields = tuple(f.without_gauge() for f in old.fields)
                env[base] = replace(old, fields=fields, uniform=False, zero=False, known=None)
            else:
                for value in (old, *rules.values_in(args)):
                    self.store.freeze(value, "is written in place through a view")
                env[base] = Value(old.shape)


def _forget_numbers(env: dict[torch.fx.Node, Any]) -> None:
    """Known numbers were overwritten, and others may view the same memory: none counts as known any more."""
    for node, value in env.items():
        if isinstance(value, Value) and value.known is not None:
            env[node] = replace(value, known=None)


def _seen_by_others(base: torch.fx.Node, step: torch.fx.Node) -> bool:
    """Whether anyone but ``step`` looks at the memory that it views; parts of one split do not overlap."""
    if step.target is operator.getitem:
        return False
    return any(user is not step for user in base.users)


def trace(model: nn.Module, example: Example) -> ChannelGraph:
    """Find the channel groups of any module.

    The model, its mode, its buffers and the random state are left alone. Works on `meta` tensors. Where the forward
    does other things in the other mode, that is traced too, and an edit has to be right in both.

    Args:
        model: any `nn.Module`; parameters may be shared between modules, parametrized, on any device.
        example: one tensor, a tuple of arguments, or a dict of keyword arguments, of the shapes used in training.
    Returns:
        The graph: groups with the edits that each admits, and what is frozen with reason and source line.
    Raises:
        TraceError: the forward fails on the example, or branches on the values of a tensor.
    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5))
        >>> trace(net, torch.zeros(2, 3, 4, 4))["0"].axis("4.weight", 1).index.shape
        torch.Size([8, 4])
    """
    programs = _programs(model, example)
    aliases, tensors = canonical_names(model)
    store = Store()
    values = {name: store.seed(name, tensor.shape) for name, tensor in tensors.items()}
    interpreter = Interpreter(store)
    for program in programs:
        outputs = interpreter.run(program.graph_module, _inputs(program, aliases, values))
        interpreter.constants += [float(n) for n in outputs if isinstance(n, int | float)]
        interpreter.where.append("")
        store.node = len(interpreter.where) - 1
        for value, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
            if isinstance(value, Value) and spec.kind == OutputKind.USER_OUTPUT:
                store.touch(value)
                store.freeze(value, OUTPUT)
    _watch_beside(store)
    builder = Builder(solve(store), interpreter.where)
    groups = tuple(builder.channel_groups() + builder.block_groups())
    graph = ChannelGraph(
        groups,
        tuple(builder.frozen(groups)),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {alias: name for alias, name in aliases.items() if alias != name},
        tuple(interpreter.operators),
        (*interpreter.constants, *(number for program in programs for number in _lifted(program))),
    )
    graph.validate()
    return without_unrun(model, graph, {name for program in programs for name in _used(program, aliases)})


def _programs(model: nn.Module, example: Example) -> list[torch.export.ExportedProgram]:
    """The forward in both modes where it does other things in the other, as far as they can be followed.

    One is enough: a batch norm without momentum, or one that skips layers at random, branches on numbers in training
    alone. What the other does is seen by the proof, which runs it.
    """
    refuse_unready(model)
    try:
        programs = [export_program(model, example)]
    except TraceError as error:
        if not runs(model, example):
            raise
        with suppress(TraceError):
            return [export_program(in_mode(model, not model.training), example)]
        raise error
    other = other_mode(model, example)
    if other is not None:
        with suppress(TraceError):
            programs.append(export_program(other, example))
    return programs


def _watch_beside(store: Store) -> None:
    """What a layer of one mode alone reads is observed at a layer of both modes that reads the same."""
    modes = {key: {node.graph for node, _ in places} for key, places in store.reads.items()}
    for key, places in store.reads.items():
        for other in store.reads:
            same = places <= store.reads[other] and len(modes[key]) < len(modes[other])
            if same and len(store.taps[other]) == 1 and None not in store.taps[other]:
                store.taps[key] = store.taps[other]
                break


def _used(program: torch.export.ExportedProgram, aliases: Mapping[str, str]) -> set[str]:
    """Names of the parameters and buffers that a program looks at."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.users]
    return {aliases.get(str(named[node.name]), "") for node in nodes if node.name in named}


def _lifted(program: torch.export.ExportedProgram) -> list[float]:
    """Small constant tensors of the forward: scales computed from a size come as such."""
    out: list[float] = []
    for value in program.constants.values():
        if isinstance(value, Tensor) and not value.is_meta and value.is_floating_point() and value.numel() <= 64:
            out += value.detach().double().flatten().tolist()
    return out


def _inputs(
    program: torch.export.ExportedProgram, aliases: Mapping[str, str], values: Mapping[str, Value]
) -> list[Any]:
    """Values of the program's placeholders: parameters with labels, everything else without."""
    signature = program.graph_signature
    lifted = signature.inputs_to_lifted_tensor_constants
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    inputs = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        name = aliases.get(str(named.get(node.name, "")))
        value = values[name] if name is not None else rules.shapes_of(node)
        inputs.append(_with_numbers(value, program.constants.get(lifted.get(node.name, ""))))
    return inputs


def _with_numbers(value: Any, constant: Any) -> Any:
    """A value with the numbers that it is known to hold."""
    if not isinstance(value, Value) or not isinstance(constant, Tensor):
        return value
    known = not constant.is_meta and constant.numel() <= rules.KNOWN_NUMBERS
    return replace(value, known=constant.detach().cpu()) if known else value
