"""The packed file: exact, small, the same bytes each time; damaged, foreign and newer files are refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.artifact import CodedTensor, Structure, decode, promised_bytes, read_packed, write_packed
from weightfold.artifact.format import Attribute, Builder, Input, Resized
from weightfold.artifact.matrix import Coding
from weightfold.artifact.packed import MAGIC, VERSION, pack, unpack
from weightfold.artifact.packed_header import Entry, deflate, in_order, varint, write_header
from weightfold.errors import ArtifactError

TASK = {
    "input": {"kind": "image", "channels": 1, "height": 28, "width": 28},
    "output": {"kind": "classes", "n": 10},
}


def lenet(head: str | None = "ab" * 32) -> Structure:
    """The structure of a LeNet-5 some of whose channels are gone."""
    before = {"conv1": (20, 1, 5, 5), "conv2": (50, 20, 5, 5), "fc1": (500, 800), "head": (10, 500)}
    after = {"conv1": (6, 1, 5, 5), "conv2": (12, 6, 5, 5), "fc1": (60, 192), "head": (10, 60)}
    sizes = {f"{m}.weight": Resized(before=before[m], after=after[m]) for m in before}
    sizes |= {f"{m}.bias": Resized(before=before[m][:1], after=after[m][:1]) for m in before if m != "head"}
    names = {
        "conv1": ["out_channels"],
        "conv2": ["out_channels", "in_channels"],
        "fc1": ["out_features", "in_features"],
    }
    attributes = [
        Attribute(module=m, name=name, before=before[m][place], after=after[m][place])
        for m, some in names.items()
        for place, name in enumerate(some)
    ]
    attributes.append(Attribute(module="head", name="in_features", before=500, after=60))
    return Structure(
        builder=Builder(kind="built-in", name="lenet5", task=TASK, overrides={"channels": (20, 50)}),
        sizes=sizes,
        attributes=tuple(attributes),
        inputs=(Input(shape=(1, 1, 28, 28)),),
        ledger_head=head,
        fingerprint="",
    )


def codes_of(structure: Structure, seed: int = 0, density: float = 0.1) -> dict[str, CodedTensor]:
    generator = np.random.default_rng(seed)
    coded = {}
    for name, resized in (structure.sizes | {"head.bias": Resized(before=(10,), after=(10,))}).items():
        shape = resized.after
        if len(shape) == 1:
            codes = np.rint(6 * generator.normal(size=shape))
            coded[name] = CodedTensor(codes.astype(np.int16), np.array([-40], np.int16))
        else:
            codes = generator.choice([-2, -1, 0, 1], shape, p=[density / 4, density / 4, 1 - density, density / 2])
            steps = -24 + generator.integers(-3, 4, shape[0])
            coded[name] = CodedTensor(codes.astype(np.int16), steps.astype(np.int16))
    return coded


def tiny() -> tuple[Structure, dict[str, CodedTensor], dict[str, np.ndarray]]:
    structure = Structure(
        builder=Builder(kind="instance", name="Net"), aliases={"b.weight": "a.weight"}, fingerprint=""
    )
    weight = CodedTensor(np.array([[1, 0, -3], [0, 0, 0]], np.int16), np.array([-8, 0], np.int16))
    plain = {"bn.running_var": np.array([0.5, 2.0], np.float16), "bn.num_batches_tracked": np.array(7)}
    return structure, {"a.weight": weight}, plain


def test_everything_comes_back(tmp_path: Path) -> None:
    structure, coded, plain = tiny()
    plain |= {
        "x.double": np.array([1 / 3]),
        "x.half": np.array(1.5, np.float32),
        "x.mask": np.array([True, False]),
        "x.bytes": np.arange(3, dtype=np.uint8),
        "x.big": np.array([2**40, -1]),
        "x.small": np.array([-128, 127], np.int32),
        "x.none": np.zeros((0, 3), np.float32),
        "odd name: of ä kind": np.ones((1, 2, 1, 1, 1, 1), np.float32),
        "weight": np.ones(2, np.float32),
    }
    path = tmp_path / "net.wfp"
    sizes = write_packed(path, structure, coded, plain)
    found = read_packed(path)
    assert found.structure.builder == structure.builder
    assert found.structure.aliases == structure.aliases
    assert found.structure.ledger_head is None
    assert found.coded["a.weight"].same(coded["a.weight"])
    assert set(found.plain) == set(plain)
    for name, array in plain.items():
        assert found.plain[name].dtype == array.dtype
        assert np.array_equal(found.plain[name], array)
    arrays = found.arrays()
    assert arrays["bn.running_var"].dtype == np.float32
    assert arrays["a.weight"].tolist() == [[0.5, 0.0, -1.5], [0.0, 0.0, 0.0]]
    assert sizes.total_bytes == path.stat().st_size == found.total_bytes
    assert abs(sizes.header_bytes + sum(sizes.by_tensor.values()) - sizes.total_bytes) < 2


def test_the_structure_comes_back() -> None:
    for head in (None, "ab" * 32, "another kind"):
        structure = lenet(head)
        found = unpack(pack(structure, codes_of(structure), {})[0]).structure
        assert dict(found.sizes) == dict(structure.sizes)
        assert {repr(one) for one in found.attributes} == {repr(one) for one in structure.attributes}
        assert found.inputs == structure.inputs
        assert found.ledger_head == head
        assert found.builder.task == TASK
        assert len(found.fingerprint) == 64


def test_attributes_that_do_not_follow_from_shapes_come_back() -> None:
    weight = CodedTensor(np.ones((4, 3), np.int16), np.zeros(4, np.int16))
    kept = (Attribute(module="fc", name="heads", before=(8, 1), after=(4, 1)),)
    sizes = {"fc.weight": Resized(before=(8, 3), after=(4, 3))}
    structure = Structure(builder=Builder(kind="instance", name="Net"), sizes=sizes, attributes=kept, fingerprint="")
    assert unpack(pack(structure, {"fc.weight": weight}, {})[0]).structure.attributes == kept


def test_the_header_of_a_small_network_is_small() -> None:
    structure = lenet()
    _, sizes = pack(structure, codes_of(structure), {})
    assert sizes.header_bytes <= 160
    assert sizes.header_bytes - 32 - 12 <= 100


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("coding", ["entropy", "packed"])
def test_the_promise_is_kept(density: float, coding: str) -> None:
    for seed in range(3):
        structure = lenet()
        coded = codes_of(structure, seed, density)
        data, sizes = pack(structure, coded, {}, coding=coding)  # type: ignore[arg-type]
        promised = promised_bytes(structure, coded, {}, coding=coding)  # type: ignore[arg-type]
        assert abs(promised - len(data)) <= 0.01 * len(data)
        assert set(sizes.codings.values()) <= ({"packed"} if coding == "packed" else {"packed", "entropy"})


def test_the_fewest_bytes_are_taken() -> None:
    structure = lenet()
    coded = codes_of(structure)
    entropy, packed = (len(pack(structure, coded, {}, coding=c)[0]) for c in ("entropy", "packed"))
    assert entropy < 0.6 * packed


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data, path = pack(*tiny())[0], tmp_path / "cut.wfp"
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(ArtifactError, match=r"cut\.wfp"):
            read_packed(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ArtifactError, match="checksum"):
        read_packed(path)


def test_every_flipped_bit_is_refused() -> None:
    data = pack(*tiny())[0]
    for place in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            with pytest.raises(ArtifactError):
                unpack(bytes(changed))


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_a_forged_file_is_read_or_refused(middle: bytes) -> None:
    data = b"WFP\x01" + middle
    try:
        unpack(data + hashlib.sha256(data).digest()[:8])
    except ArtifactError:
        return


def test_a_newer_version_and_foreign_files_are_refused(tmp_path: Path) -> None:
    data = bytearray(pack(*tiny())[0])
    data[3] = 2
    with pytest.raises(ArtifactError, match="reads up to 1"):
        unpack(bytes(data))
    with pytest.raises(ArtifactError, match="no packed model"):
        unpack(b"PK\x03\x04 a zip")
    with pytest.raises(ArtifactError, match="There is no model file"):
        read_packed(tmp_path / "none.wfp")


def test_what_cannot_be_written_is_refused() -> None:
    structure, coded, _ = tiny()
    for plain, complaint in (
        ({"a.weight": np.ones(2)}, "both as codes and as an array"),
        ({"x": np.array([np.nan])}, "not finite"),
        ({"x": np.array(["text"])}, "has the type"),
        ({"x": np.ones((1,) * 7)}, "six dimensions"),
    ):
        with pytest.raises(ArtifactError, match=complaint):
            pack(structure, coded, plain)
    wrong = structure.model_copy(update={"sizes": {"a.weight": Resized(before=(4, 3), after=(3, 3))}})
    with pytest.raises(ArtifactError, match="its structure says"):
        pack(wrong, coded, {})


def test_the_order_in_which_tensors_are_given_does_not_matter() -> None:
    structure = lenet()
    coded = codes_of(structure)
    turned = dict(reversed(coded.items()))
    assert pack(structure, coded, {})[0] == pack(structure, turned, {})[0]
    assert in_order(coded) == in_order(turned)


_ENTROPY = "0088e7408f42804889ce8e36f5bb9298aa54b996777029175532dd1aef6e47286d109513"
_PACKED = "014cea666062567c8c288c1077b427797777c5377a877776477b927777577777c5377a877776476777b427797777c537"
_FILE = (
    "574650012543f52e5286857ad72fb544a9169a0092f4caa1be524a84316ba14e4884351680711e5b0b000020020318020700"
    "3800400107983cde4b415e5a3a01df736b"
)


def test_files_of_format_1_stay_readable() -> None:
    """These bytes are never renewed: what was written once stays readable, and a new format has a new version."""
    numbers = np.arange(108) * 7919 % 23
    codes = np.where(numbers < 12, 0, numbers - 17).reshape(6, 2, 3, 3)
    codes[2] = 0
    codes[4] = np.sign(codes[4])
    steps = np.array([-20, -18, 0, -23, -16, -20], np.int16)
    for data in (_ENTROPY, _PACKED):
        assert decode(bytes.fromhex(data), codes.shape).same(CodedTensor(codes, steps))
    found, (structure, coded, plain) = unpack(bytes.fromhex(_FILE)), tiny()
    assert found.coded["a.weight"].same(coded["a.weight"])
    assert {name: array.tolist() for name, array in found.plain.items()} == {n: a.tolist() for n, a in plain.items()}
    assert found.structure.aliases == structure.aliases
    assert found.structure.fingerprint == "f42b8191e405d1d3f84eb94bd465662a6d67486c8f5d5dc93f5101ff7ab901bd"


_PROBE = """
import sys
sys.modules["torch"] = None
from weightfold.artifact import read_packed
found = read_packed(sys.argv[1])
print(found.structure.fingerprint, sorted(found.arrays()), "torch" in str(sys.modules.get("torch")))
"""


def test_the_reader_needs_no_torch_and_hash_seeds_change_nothing(tmp_path: Path) -> None:
    script = tmp_path / "probe.py"
    script.write_text(_PROBE)
    writer = tmp_path / "write.py"
    writer.write_text(
        "import sys, numpy as np\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[2])\n"
        "from test_packed import lenet, codes_of, pack\n"
        "Path(sys.argv[1]).write_bytes(pack(lenet(), codes_of(lenet()), {})[0])\n"
    )
    files = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        path = tmp_path / f"{seed}.wfp"
        for command in ([str(writer), str(path), str(Path(__file__).parent)], [str(script), str(path)]):
            done = subprocess.run(
                [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, done.stderr
        files.append((path.read_bytes(), done.stdout))
    assert files[0] == files[1]
    assert "conv1.weight" in files[0][1]


def _resealed(header: bytes, body: bytes) -> bytes:
    data = MAGIC + bytes([VERSION]) + header + body
    return data + hashlib.sha256(data).digest()[:8]


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("entropy", [(1 << 10, 1 << 10)]),
        ("packed", [(1, 1 << 20)]),
        ("int64", [(1 << 20,)]),
        ("float32", [(0, 1 << 60)]),
        ("entropy", [(1 << 40, 0)]),
        ("int32", [(1 << 15,)] * 40),
    ],
)
def test_a_small_file_cannot_declare_much(kind: str, shapes: list[tuple[int, ...]]) -> None:
    structure = Structure(builder=Builder(kind="instance", name="Net"), fingerprint="")
    entries = [Entry(f"a.x{n}", shape, kind) for n, shape in enumerate(shapes)]
    with pytest.raises(ArtifactError, match="bytes explain"):
        unpack(_resealed(write_header(structure, entries), b"\0" * len(shapes)))


@pytest.mark.parametrize("coding", ["entropy", "packed"])
def test_a_network_of_zeros_is_written_so_that_it_is_read(coding: Coding) -> None:
    structure = Structure(builder=Builder(kind="instance", name="Net"), fingerprint="")
    coded = {"w": CodedTensor(np.zeros((1000, 3000), np.int16), np.zeros(1000, np.int16))}
    plain = {"n": np.zeros(1 << 20, np.int64)}
    data, sizes = pack(structure, coded, plain, coding=coding)
    assert len(data) == sizes.total_bytes < 5000
    assert abs(promised_bytes(structure, coded, plain, coding=coding) - len(data)) < 8
    twin = unpack(data)
    assert twin.coded["w"].same(coded["w"])
    assert np.array_equal(twin.plain["n"], plain["n"])


@pytest.mark.parametrize(
    "text",
    [
        r'{"b":{"kind":"instance","name":"N"},"n":["\ud800:"]}',
        '{"b":{"kind":"instance","name":"N"},"n":[[1]]}',
        '{"b":{"kind":"instance","name":"N"},"n":{}}',
        '{"b":{"kind":"built-in","name":"mlp","overrides":{"a":1e999}},"n":[]}',
        '{"b":{"kind":"instance","name":"N"},"n":[],"a":[[[]]]}',
        '{"b":{"kind":"instance","name":"N"},"n":[],"l":{"a":["b"]}}',
        '{"b":' * 70 + "1" + "}" * 70,
    ],
)
def test_a_header_of_anything_else_is_an_error_of_ours(text: str) -> None:
    short = deflate(text.encode())
    with pytest.raises(ArtifactError, match="header of a packed file is corrupt"):
        unpack(_resealed(varint(len(short)) + short + b"\0", b""))


def test_a_header_that_inflates_to_megabytes_is_refused() -> None:
    short = deflate(b'{"b":1}' + b" " * (1 << 20))
    with pytest.raises(ArtifactError, match="cut off or too long"):
        unpack(_resealed(varint(len(short)) + short + b"\0", b""))


def test_a_network_without_tensors_comes_back() -> None:
    structure = Structure(builder=Builder(kind="instance", name="Net"), fingerprint="")
    assert unpack(pack(structure, {}, {})[0]).arrays() == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_not_read(value: float) -> None:
    structure = Structure(builder=Builder(kind="instance", name="Net"), fingerprint="")
    header = write_header(structure, [Entry("b", (1,), "float32")])
    with pytest.raises(ArtifactError, match="'b' holds values that are not finite"):
        unpack(_resealed(header, np.array([value], "<f4").tobytes()))
