"""Trace any `nn.Module` into a `ChannelGraph`.

`torch.export` (non-strict, no decompositions) gives the operators; `rules` say what each does to channels; `build`
takes the connected components. Nothing of the model is touched: a structural copy that shares its tensors is traced.
"""

from __future__ import annotations

import copy
import linecache
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from weightfold.errors import TraceError
from weightfold.graph import rules
from weightfold.graph.build import Builder
from weightfold.graph.constants import export_with_constant_branches
from weightfold.graph.group import ChannelGraph
from weightfold.graph.labels import Store, Value
from weightfold.graph.solve import OUTPUT, solve

PARTIAL_WRITES = frozenset({"copy", "add", "sub", "mul", "div", "addcmul", "lerp", "masked_fill", "where"})
"""Operators whose in-place form, on a view, changes a part of a tensor by what another tensor holds."""

RULES_MUST_NOT_FAIL: ContextVar[bool] = ContextVar("RULES_MUST_NOT_FAIL", default=False)
"""Let an exception inside a rule through instead of freezing what the operator meets: set by the tests."""

Example = Any
"""One tensor, a tuple of positional arguments, or a mapping of keyword arguments."""


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that an example stands for."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], tuple)
        and isinstance(example[1], dict)
    ):
        return example
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def structural_copy(model: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Module:
    """Copy the modules but not the tensors, and leave hooks behind.

    Args:
        tensor: what to put in place of each parameter and buffer (the identity shares them; a meta copy costs nothing).
    """
    memo: dict[int, Any] = {}
    for source in (*model.parameters(), *model.buffers()):
        memo[id(source)] = tensor(source)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"The model '{type(model).__name__}' cannot be copied: {error}",
            remedy="Keep locks, files and generators out of the module's attributes.",
        ) from error
    for module in twin.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
    flush_caches(twin)
    return twin


def flush_caches(model: nn.Module) -> None:
    """Let modules that keep tensors computed from their weights in eval mode (and drop them in `train`) drop them."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        if type(module).train is not nn.Module.train:
            module.train(True)
    for module, training in modes.items():
        module.training = training


def meta_tensor(source: Tensor) -> Tensor:
    """A tensor without storage of the same kind."""
    empty = torch.empty_like(source, device="meta")
    if isinstance(source, nn.Parameter):
        return nn.Parameter(empty, requires_grad=source.requires_grad)
    return empty


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the tracer's side effects away: RNG state, warnings, the fused attention path, gradients."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        yield


def export_program(model: nn.Module, example: Example) -> torch.export.ExportedProgram:
    """Export a structural copy of a model.

    Raises:
        TraceError: the forward fails on the example, or branches on data.
    """
    args, kwargs = arguments(example)
    twin = structural_copy(model)
    config = getattr(twin, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    with quiet():
        try:
            program = torch.export.export(twin, args, kwargs, strict=False)
            return program.run_decompositions({}) if _writes_through_views(program.graph_module) else program
        except Exception as error:
            if _is_branch(error) and (program := _along_constants(twin, args, kwargs)) is not None:
                return program
            raise _explain(model, error) from error


def _along_constants(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return export_with_constant_branches(twin, args, kwargs)
    except Exception:  # whatever it is, the first refusal says more
        return None


def _is_branch(error: Exception) -> bool:
    kind = type(error).__name__
    return "GuardOnDataDependent" in kind or "data-dependent" in str(error).lower() or "DynamicOutputShape" in kind


def _writes_through_views(module: torch.fx.GraphModule) -> bool:
    """Whether values are written into parts of a tensor: then the program is rewritten without such writes."""
    return any(
        rules.node_name(node) in PARTIAL_WRITES and rules.in_place(node) and _is_view(node.args[0])
        for part in module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if node.op == "call_function" and node.args and isinstance(node.args[0], torch.fx.Node)
    )


def _explain(model: nn.Module, error: Exception) -> TraceError:
    text = str(error).strip().split("\n")[0][:300]
    kind = type(error).__name__
    where = _user_line(error)
    name = type(model).__name__
    if _is_branch(error):
        return TraceError(
            f"The forward of '{name}' branches on the values of a tensor{where}: {text}",
            remedy="Move the branch out of the forward, or replace it by torch.where / torch.cond.",
        )
    return TraceError(
        f"The forward of '{name}' fails on the example{where}: {kind}: {text}",
        remedy="Pass an example with the shapes and types that the model takes in training.",
    )


def _user_line(error: BaseException) -> str:
    """The last line of user code in a traceback, as " (file:line: code)"."""
    frame, found = error.__traceback__, ""
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not re.search(r"[\\/](torch|weightfold)[\\/]", file) and not file.startswith("<"):
            code = linecache.getline(file, frame.tb_lineno).strip()
            found = f" ({file}:{frame.tb_lineno}: {code})"
        frame = frame.tb_next
    return found


def source_line(node: torch.fx.Node) -> str:
    """Where in the user's code an operator comes from, as " (file:line: code)"."""
    text = node.meta.get("stack_trace") or ""
    hits = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', text)
    if not hits:
        return ""
    own = [hit for hit in hits if not re.search(r"[\\/]torch[\\/]", hit[0])]
    file, line, code = (own or hits)[-1]
    return f" ({file}:{line}: {code.strip()})"


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
        self.constants += [float(a) for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, float)]
        result = self._apply(node, args, kwargs)
        if rules.in_place(node) and node.args:
            self._written(node, env, args, result)
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

    def _written(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any], args: list[Any], result: Any) -> None:
        """An in-place operator changes what later users of its target see."""
        target = node.args[0]
        if not isinstance(target, torch.fx.Node) or not isinstance(env.get(target), Value):
            return
        if env[target].known is not None:
            _forget_numbers(env)
        env[target] = result
        base, unary = target, len(rules.values_in(args)) == 1
        while base.op == "call_function" and _is_view(base) and isinstance(base.args[0], torch.fx.Node):
            step, base = base, base.args[0]
            if not unary and not _seen_by_others(base, step):
                continue
            old = env.get(base)
            if not isinstance(old, Value):
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


def _is_view(node: torch.fx.Node) -> bool:
    return node.target is operator.getitem or rules.node_name(node) in rules.MOVES


def _seen_by_others(base: torch.fx.Node, step: torch.fx.Node) -> bool:
    """Whether anyone but ``step`` looks at the memory that it views; parts of one split do not overlap."""
    if step.target is operator.getitem:
        return False
    return any(user is not step for user in base.users)


def trace(model: nn.Module, example: Example) -> ChannelGraph:
    """Find the channel groups of any module.

    The model, its mode, its buffers and the random state are left alone. Works on `meta` tensors.

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
    program = export_program(model, example)
    aliases, tensors = canonical_names(model)
    store = Store()
    values = {name: store.seed(name, tensor.shape) for name, tensor in tensors.items()}
    interpreter = Interpreter(store)
    outputs = interpreter.run(program.graph_module, _inputs(program, aliases, values))
    interpreter.where.append("")
    store.node = len(interpreter.where) - 1
    for value, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
        if isinstance(value, Value) and spec.kind == OutputKind.USER_OUTPUT:
            store.touch(value)
            store.freeze(value, OUTPUT)
    builder = Builder(solve(store), interpreter.where)
    groups = tuple(builder.channel_groups() + builder.block_groups())
    graph = ChannelGraph(
        groups,
        tuple(builder.frozen(groups)),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {alias: name for alias, name in aliases.items() if alias != name},
        tuple(interpreter.operators),
        (*interpreter.constants, *_lifted(program)),
    )
    graph.validate()
    return graph


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
    """A value with the integers that it is known to hold."""
    if not isinstance(value, Value) or not isinstance(constant, Tensor):
        return value
    known = not (constant.is_meta or constant.is_floating_point() or constant.is_complex())
    return replace(value, known=constant.detach().cpu()) if known else value
