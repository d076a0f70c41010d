"""What of a program reaches PyTorch's loader: sizes, operators, names. Whatever else stands in a file is refused."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightfold.errors import ArtifactError
from weightfold.runtime.expressions import refusal
from weightfold.runtime.graphs import graph_module
from weightfold.runtime.opened import program_of
from weightfold.runtime.program_check import checked_archive
from weightfold.runtime.require import quiet

MODEL = "archive/models/model.json"


class Net(nn.Module):
    """A parameter named as a field of the format, a buffer, a constant, sizes that are computed, a branch on data."""

    def __init__(self) -> None:
        super().__init__()
        self.custom = nn.Linear(3, 4)
        self.register_buffer("target", torch.ones(4))
        self.extra = torch.full((4,), 2.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        y = nn.functional.gelu(self.custom(x), approximate="tanh") * self.target + self.extra
        y = y.reshape(2 * x.shape[0], -1)[: x.shape[0] + 1].clamp(min=-float("inf"))
        with torch.no_grad():
            z = y.sum(-1) if mask is None else y.sum(-1) * mask.sum()
        return {"y": y, "z": z}


@pytest.fixture(scope="module")
def program() -> bytes:
    return written(Net(), (torch.ones(4, 3),))


def written(net: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(torch.export.export(net.eval(), inputs, dynamic_shapes=shapes, strict=False), buffer)
    return buffer.getvalue()


def changed(program: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(program)) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    change(parts)
    with zipfile.ZipFile(out, "w") as new:
        for name, data in parts.items():
            new.writestr(name, data)
    return out.getvalue()


def in_model(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(parts: dict[str, bytes]) -> None:
        model = json.loads(parts[MODEL])
        change(model)
        parts[MODEL] = json.dumps(model).encode()

    return apply


def test_a_program_computes_as_before(program: bytes) -> None:
    net, x = Net(), torch.randn(6, 3)
    module = program_of(written(net, (torch.ones(4, 3),)), "net.pt2").module()
    for name, value in net(x).items():
        assert torch.equal(module(x)[name], value)


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (nn.MultiheadAttention(8, 2, batch_first=True), (torch.ones(2, 3, 8),) * 3),
        (nn.GRU(3, 5, num_layers=2, batch_first=True), (torch.ones(2, 4, 3),)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.MaxPool2d(2)), (torch.ones(2, 3, 8, 8),)),
        (nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Upsample(scale_factor=2)), (torch.ones(2, 6),)),
    ],
)  # fmt: skip
def test_usual_layers_pass(net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    module = program_of(written(net, inputs), "net.pt2").module()
    one, two = net.eval()(*inputs), module(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(one), torch.utils._pytree.tree_leaves(two), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


SHELL = "__import__('os').system('true')"


def _first_node(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"][0]


def _tree(context: str, kind: str = "builtins.dict") -> str:
    return json.dumps([1, {"type": kind, "context": context, "children_spec": []}])


def _signature(model: Any) -> Any:
    return model["graph_module"]["module_call_graph"][0]["signature"]


ENUM = json.dumps([{"__enum__": True, "fqn": "os:system", "name": "x"}])
HOSTILE: dict[str, Callable[[dict[str, bytes]], None]] = {
    "expression": in_model(lambda m: m["graph_module"]["graph"]["sym_int_values"].update(
        a={"as_expr": {"expr_str": SHELL, "hint": None}})),
    "operator of the library": in_model(lambda m: _first_node(m).update(target="torch.serialization.os.system")),
    "operator that calls": in_model(lambda m: _first_node(m).update(target="_operator.methodcaller")),
    "operator that opens a file": in_model(lambda m: _first_node(m).update(target="torch.ops.aten.from_file.default")),
    "operator of an extension": in_model(lambda m: _first_node(m).update(target="#ns:op")),
    "operator as an argument": in_model(lambda m: _first_node(m)["inputs"][0].update(
        arg={"as_operator": "torch.load"})),
    "name that is source": in_model(lambda m: _first_node(m).update(name=f"x={SHELL}")),
    "input that is source": in_model(lambda m: m["graph_module"]["graph"]["inputs"].append(
        {"as_tensor": {"name": f"x={SHELL}"}})),
    "path with a quote": in_model(lambda m: m["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
        parameter_name=f'a"+{SHELL}+"')),
    "argument name that is source": in_model(lambda m: _signature(m).update(forward_arg_names=[f"x={SHELL}"])),
    "enumeration": in_model(lambda m: _signature(m).update(in_spec=_tree(ENUM))),
    "tuple of names": in_model(lambda m: _signature(m).update(in_spec=_tree('"os"', "collections.namedtuple"))),
    "key with a quote": in_model(lambda m: _signature(m).update(in_spec=_tree(json.dumps([f"']+{SHELL}+['"])))),
    "object of a class": in_model(lambda m: m["graph_module"]["graph"]["custom_obj_values"].update(
        a={"name": "a", "class_fqn": "os.x"})),
    "symbol that counts to 10^9": in_model(lambda m: m["range_constraints"].update(
        u999999999={"min_val": 0, "max_val": 1})),
    "pickled weight": lambda parts: parts.update({
        k: v.replace(b'"use_pickle": false', b'"use_pickle": true')
        for k, v in parts.items() if "weights_config" in k}),
    "pickled constant": lambda parts: parts.update(
        {k: v.replace(b"tensor_0", b"opaque_obj_0") for k, v in parts.items() if "constants_config" in k}),
    "weight without bytes": lambda parts: parts.update({"archive/data/weights/weight_0": b""}),
    "old weights": lambda parts: parts.update({"archive/data/weights/model.pt": pickle.dumps(1)}),
    "old layout": lambda parts: parts.update({"archive/serialized_exported_program.json": b"{}"}),
    "second program": lambda parts: parts.update({"archive/models/other.json": parts[MODEL]}),
    "nesting": lambda parts: parts.update({MODEL: b'{"a":' * 5000 + b"1" + b"}" * 5000}),
    "long number": in_model(lambda m: m.update(schema_version={"major": 10**400, "minor": 0})),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_be_run_is_refused(program: bytes, kind: str) -> None:
    with pytest.raises(ArtifactError, match=r"The program in 'net.pt2' cannot be read"):
        program_of(changed(program, HOSTILE[kind]), "net.pt2")


def test_guards_are_left_out(program: bytes, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch() or True"
    module = program_of(changed(program, in_model(lambda m: m.update(guards_code=[code]))), "net.pt2").module()
    module(torch.ones(4, 3))
    assert not mark.exists()


def test_what_was_checked_is_what_is_read(program: bytes) -> None:
    """Two files of one name: one for a reader, another for the next."""
    twice = io.BytesIO(program)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(MODEL, b"{}")
    with pytest.raises(ArtifactError, match="stands twice"):
        program_of(twice.getvalue(), "net.pt2")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MODEL, b" " * (1 << 20))
    with pytest.raises(ArtifactError, match="is compressed"):
        program_of(packed.getvalue(), "net.pt2")


def test_random_damage_is_an_error_of_ours(program: bytes) -> None:
    draw = random.Random(0)
    for _ in range(300):
        data = bytearray(program)
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            checked_archive(bytes(data))
        except Exception as error:
            with pytest.raises(ArtifactError):
                program_of(bytes(data), str(error))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', integer=True, positive=True)",
        "s0*2 + s1//3 - 1",
        "Mod(s0, 8)",
        "Max(1, Min(s0, u12))",
        "Eq(s0, 4)",
        "s0 <= 4",
        "Pow(Symbol('s77', positive=True, integer=True), Integer(2))",
        "FloatTrueDiv(ToFloat(s0), Float('2.0', precision=53))",
        "Or(Eq(s0, 1), Ne(s1, 2), true)",
        "Integer(-4)",
    ],
)
def test_sizes_pass(text: str) -> None:
    assert refusal(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "s0.__class__", "open('x')", "(lambda: 1)()", "[s0]", "s0[0]", "f'{s0}'", "Symbol('os')",
        "Symbol('s0', commutative=False)", "Symbol(s0)", "9**9**9", "Pow(Pow(9, 9), 9)", "2**s0", "LShift(1, 999999)",
        "Integer(10**400)", "s0 if s0 else s1", "Lambda(s0, s0)", "S('x')", "eval('1')", "Add(*s0)",
        "Add(s0, evaluate=1)",
        "(" * 300 + "s0" + ")" * 300, "s0 := 1", "", "s0 +", "\u017f0", "Float('1e99999')", "9" * 200, "E", "exec",
    ],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    assert refusal(text) is not None


def test_a_graph_that_no_forward_is_written_of_is_refused(program: bytes) -> None:
    """Two inputs of one name."""

    def twice(model: Any) -> None:
        graph, signature = model["graph_module"]["graph"], model["graph_module"]["signature"]
        text = json.dumps([graph, signature]).replace('"p_custom_bias"', '"x"')
        model["graph_module"]["graph"], model["graph_module"]["signature"] = json.loads(text)

    with pytest.raises(ArtifactError, match="cannot be"):
        graph_module(program_of(changed(program, in_model(twice)), "net.pt2"))
