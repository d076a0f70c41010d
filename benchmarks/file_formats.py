"""The formats that `file_fuzz` damages: legal samples, damage behind the checksums, the reader, what must then hold."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import file_mutations as mutate
import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

import weightfold
from weightfold.artifact import CodedTensor, packed, packed_header
from weightfold.artifact import matrix as coded_matrix
from weightfold.artifact.format import Builder, Structure, parse_structure
from weightfold.artifact.header import parse_header
from weightfold.fingerprint import digest
from weightfold.models import TaskSpec, build
from weightfold.quant.clustered import KEY as CLUSTERED
from weightfold.quant.clustered import Layout, cluster, read_clustered, write_clustered
from weightfold.weights.symmetry import symmetries
from weightfold.zoo.delta import codec, matching
from weightfold.zoo.find.index import Index
from weightfold.zoo.storage import tables
from weightfold.zoo.storage.catalogue import Catalogue, Content, Model, _summed
from weightfold.zoo.storage.contents import from_blob, to_blob


@dataclass
class Format:
    """One format.

    Args:
        weight: share of the inputs.
        samples: legal files, in whatever form `damage` takes.
        damage: a sample and a generator to the bytes of a file whose checksums are right.
        read: the reader.
        whole: tells that what a legal sample gives is what was written.
        holds: tells that what was read of a damaged file keeps to its own declarations.
    """

    name: str
    weight: float
    samples: list[Any]
    damage: Callable[[Any, Random], bytes]
    read: Callable[[bytes], Any]
    whole: Callable[[Any, Any], bool]
    legal: Callable[[Any], bytes]
    holds: Callable[[Any, bytes], bool] = lambda _, __: True


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether tensors are alike by name, type and shape, and to the bit."""
    if one.keys() != two.keys():
        return False
    pairs = [(one[name], two[name]) for name in one]
    return all(a.dtype == b.dtype and a.shape == b.shape and octets_of(a) == octets_of(b) for a, b in pairs)


def octets_of(value: Tensor) -> bytes:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def through(folder: Path, name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    """A reader of paths as a reader of bytes."""
    path = folder / name

    def run(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return run


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()[:8]


# packed files ---------------------------------------------------------------------------------------------------------

TASK = {"input": {"kind": "table", "n_features": 3}, "output": {"kind": "classes", "n": 2}}
BUILDER = {"kind": "built-in", "name": "mlp", "task": TASK, "overrides": {"hidden": [5]}}


def structure(**more: Any) -> Structure:
    return Structure(builder=Builder(**BUILDER), fingerprint="", **more)


def packed_format() -> Format:
    draw = np.random.default_rng(0)
    samples = []
    for shape in ((4, 6), (2, 3, 3, 3), (1, 16), (5,), ()):
        codes = (draw.integers(-3, 4, shape) * (draw.random(shape) < 0.5)).astype(np.int16)
        coded = {"a.weight": CodedTensor(codes, draw.integers(-20, 20, shape[:1] or 1).astype(np.int16))}
        plain = {"a.bias": draw.random(4).astype(np.float32), "n": np.arange(3), "m": np.array([True, False])}
        samples += [(structure(), coded, plain, coding) for coding in ("entropy", "packed")]

    coded_once = {id(sample): packed.pack(*sample[:3], coding=sample[3])[0] for sample in samples}

    def legal(sample: Any) -> bytes:
        return coded_once[id(sample)]

    def damage(sample: Any, rng: Random) -> bytes:
        data = legal(sample)[:-8]
        length, at = packed_header.read_varint(data, 4)
        if rng.random() < 0.4:
            document = json.loads(packed_header.inflate(data[at : at + length]))
            text = mutate.written(mutate.tree(document, rng), rng).encode("utf-8", "surrogatepass")
            short = packed_header.deflate(text)
            return sealed(data[:4] + packed_header.varint(len(short)) + short + data[at + length :])
        return sealed(data[: at + length] + mutate.octets(data[at + length :], rng))

    def whole(sample: Any, found: Any) -> bool:
        return all(found.coded[n].same(c) for n, c in sample[1].items()) and all(
            np.array_equal(found.plain[n], a) for n, a in sample[2].items()
        )

    def holds(found: Any, _: bytes) -> bool:
        arrays = found.arrays()
        again = packed.unpack(packed.pack(found.structure, found.coded, found.plain, coding="packed")[0]).arrays()
        return arrays.keys() == again.keys() and all(np.array_equal(arrays[n], again[n]) for n in arrays)

    return Format("packed", 6, samples, damage, packed.unpack, whole, legal, holds)


def codes_format() -> Format:
    draw = np.random.default_rng(1)
    samples = []
    for shape in ((6, 8), (3, 2, 3, 3), (12,), (2, 25)):
        codes = (draw.integers(-40, 41, shape) * (draw.random(shape) < 0.4)).astype(np.int16)
        samples.append(CodedTensor(codes, draw.integers(-90, 90, shape[0]).astype(np.int16)))
    shapes = {0: samples[0].shape}
    coded_once = {(id(s), how): coded_matrix.encode(s, how) for s in samples for how in ("entropy", "packed")}

    def damage(sample: Any, rng: Random) -> bytes:
        shapes[0] = sample.shape
        return mutate.octets(coded_once[id(sample), rng.choice(("entropy", "packed"))], rng)

    def legal(sample: Any) -> bytes:
        shapes[0] = sample.shape
        return coded_once[id(sample), "entropy"]

    def holds(found: Any, _: bytes) -> bool:
        return found.shape == shapes[0] and bool(np.isfinite(found.values()).all())

    return Format("codes", 5, samples, damage, lambda data: coded_matrix.decode(data, shapes[0]),
                  lambda sample, found: found.same(sample), legal, holds)  # fmt: skip


# safetensors ----------------------------------------------------------------------------------------------------------


def with_header(data: bytes, rng: Random, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file with another header, its length made right."""
    size = int.from_bytes(data[:8], "little")
    text = mutate.written(change(json.loads(data[8 : 8 + size])), rng).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def header_format() -> Format:
    samples = [
        save({"w": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.int64)}, {"a": "b"}),
        save({"x": torch.ones(1)}),
    ]

    def damage(sample: bytes, rng: Random) -> bytes:
        return (
            with_header(sample, rng, lambda tree: mutate.tree(tree, rng))
            if rng.random() < 0.8
            else mutate.octets(sample, rng)
        )

    def holds(found: Any, data: bytes) -> bool:
        return all(0 < t.begin <= t.end <= len(data) for t in found.tensors.values())

    return Format("safetensors header", 20, samples, damage, lambda data: parse_header(data, "file"),
                  lambda _, found: len(found.tensors) > 0, lambda sample: sample, holds)  # fmt: skip


def structure_format() -> Format:
    changes = {
        "sizes": {"w": {"before": [4, 2], "after": [3, 2]}},
        "attributes": [{"module": "body.0", "name": "out_features", "before": 5, "after": 3}],
        "inputs": [{"shape": [1, 3]}],
        "aliases": {"b": "w"},
    }
    samples = [json.loads(structure(**changes).to_json()), json.loads(structure().to_json())]

    def damage(sample: Any, rng: Random) -> bytes:
        return mutate.written(mutate.tree(sample, rng), rng).encode("utf-8", "surrogatepass")

    def read(data: bytes) -> Structure:
        return parse_structure(data.decode("utf-8", "surrogatepass"), "file")

    def holds(found: Structure, _: bytes) -> bool:
        return Structure.from_json(found.to_json()) == found

    return Format("structure", 20, samples, damage, read, lambda sample, found: json.loads(found.to_json()) == sample,
                  lambda sample: json.dumps(sample).encode(), holds)  # fmt: skip


def saved_format(folder: Path) -> Format:
    net = build("mlp", TaskSpec(**TASK), hidden=(5,))
    state = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    sample = (json.loads(structure().model_copy(update={"fingerprint": digest(state)}).to_json()), state)

    def legal(sample: Any) -> bytes:
        return save(sample[1], {"weightfold": json.dumps(sample[0])})

    def damage(sample: Any, rng: Random) -> bytes:
        """Another structure, or other tensors, with their fingerprint in the structure."""
        tree, tensors = json.loads(json.dumps(sample[0])), dict(sample[1])
        if rng.random() < 0.3:
            name = rng.choice(list(tensors))
            tensors[name] = rng.choice(
                (
                    torch.zeros(3),
                    tensors[name].double(),
                    tensors[name][None],
                    torch.full_like(tensors[name], float("nan")),
                )
            )
        tree["fingerprint"] = digest(tensors)
        if rng.random() < 0.8:
            part = rng.choice(("builder", "builder", "sizes", "attributes", "aliases", None))
            if part is None:
                tree = mutate.tree(tree, rng)
            else:
                tree[part] = mutate.tree(tree[part], rng)
        data = save(tensors, {"weightfold": "@"})
        size = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + size].decode().replace('"@"', json.dumps(mutate.written(tree, rng)))
        head = text.encode("utf-8", "surrogatepass")
        return len(head).to_bytes(8, "little") + head + data[8 + size :]

    def holds(found: Any, _: bytes) -> bool:
        return isinstance(found, nn.Module)

    return Format("saved model", 3, [sample], damage, through(folder, "s.safetensors", weightfold.load),
                  lambda sample, found: equal(dict(found.state_dict()), sample[1]), legal, holds)  # fmt: skip


def clustered_format(folder: Path) -> Format:
    samples = []
    for layout, shape in (
        (Layout(4), (6, 8)),
        (Layout(3, rows=2), (5, 4)),
        (Layout(2, vector=2), (4, 6)),
        (Layout(1), (3, 3)),
    ):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        item = cluster(weight, layout, torch.float32)
        for coding in ("packed", "deflated"):
            write_clustered(folder / "c.safetensors", {"w": item}, {"b": weight}, aliases={"v": "w"}, coding=coding)  # type: ignore[arg-type]
            samples.append(
                ((folder / "c.safetensors").read_bytes(), {"w": item.values(), "b": weight, "v": item.values()})
            )

    def damage(sample: Any, rng: Random) -> bytes:
        if rng.random() < 0.25:
            data = sample[0]
            at = 8 + int.from_bytes(data[:8], "little")
            return data[:at] + mutate.octets(data[at:], rng)[: len(data) - at].ljust(len(data) - at, b"\1")

        def change(tree: Any) -> Any:
            about = mutate.written(mutate.tree(json.loads(tree["__metadata__"][CLUSTERED]), rng), rng)
            tree["__metadata__"][CLUSTERED] = about
            return tree

        return with_header(sample[0], Random(1), change)

    def holds(found: Any, _: bytes) -> bool:
        return all(isinstance(value, Tensor) for value in found.values())

    return Format("clustered", 8, samples, damage, through(folder, "c.safetensors", read_clustered),
                  lambda sample, found: equal(found, sample[1]), lambda sample: sample[0], holds)  # fmt: skip


# the zoo --------------------------------------------------------------------------------------------------------------


def small(seed: int) -> dict[str, Tensor]:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}


def delta_format() -> Format:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = symmetries(net, torch.zeros(1, 4))
    parent, samples = small(0), []
    near = {
        name: value + 0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        for name, value in parent.items()
    }
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = {"0.weight": near["0.weight"][order] * 2, "0.bias": near["0.bias"][order] * 2,
             "2.weight": near["2.weight"][:, order] / 2, "2.bias": near["2.bias"]}  # fmt: skip
    more = near | {"extra": torch.arange(5), "tied": near["0.bias"], "h": torch.ones(3).half()}
    for child, step in ((near, None), (moved, None), (more, None), (near, 1e-3), (moved, 1e-2)):
        moves = matching.match(found, child, parent) if child is moved else None
        data = codec.encode(child, parent, moves=moves, step=step)
        samples.append((data, codec.decode(data, parent)))

    def damage(sample: Any, rng: Random) -> bytes:
        """The checksum is of the decoded tensors: they are decoded for it, where they can be."""
        kind, payload = sample[0][:1], mutate.octets(sample[0][9:], rng, rng.choice(samples)[0][9:])
        with contextlib.suppress(Exception):
            return kind + codec._check(kind, payload, codec._read(payload, dict(sorted(parent.items())))) + payload
        return kind + bytes(8) + payload

    def holds(state: Any, _: bytes) -> bool:
        return list(state) == sorted(state) and all(isinstance(value, Tensor) for value in state.values())

    return Format("delta", 1.5, samples, damage, lambda data: codec.decode(data, parent),
                  lambda sample, state: equal(state, sample[1]), lambda sample: sample[0], holds)  # fmt: skip


def blob_format() -> Format:
    weight = torch.ones(3)
    samples = [small(0), {"a": weight, "b": weight, "c": torch.zeros((), dtype=torch.int64)}]

    def damage(sample: Any, rng: Random) -> bytes:
        data = to_blob(sample)
        return (
            with_header(data, rng, lambda tree: mutate.tree(tree, rng))
            if rng.random() < 0.8
            else mutate.octets(data, rng)
        )

    return Format("zoo blob", 10, samples, damage, from_blob, lambda sample, state: equal(state, dict(sample)), to_blob,
                  lambda state, _: list(state) == sorted(state))  # fmt: skip


def symmetries_format() -> Format:
    nets = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)))  # fmt: skip
    samples = [tables.to_bytes(symmetries(net, torch.zeros(1, 4))) for net in nets]

    def damage(sample: bytes, rng: Random) -> bytes:
        n, whole = int.from_bytes(sample[:8], "little"), zlib.decompress(sample[8:])
        text, file = whole[:n], whole[n:]
        if rng.random() < 0.7:
            text = mutate.written(mutate.tree(json.loads(text), rng), rng).encode("utf-8", "surrogatepass")
        else:
            file = with_header(file, rng, lambda tree: mutate.tree(tree, rng))
        return len(text).to_bytes(8, "little") + zlib.compress(text + file, 1)

    def holds(found: Any, _: bytes) -> bool:
        return tables.to_bytes(tables.from_bytes(tables.to_bytes(found))) == tables.to_bytes(found)

    return Format("zoo symmetries", 2, samples, damage, tables.from_bytes,
                  lambda sample, found: tables.to_bytes(found) == sample, lambda sample: sample, holds)  # fmt: skip


def catalogue_format(folder: Path) -> Format:
    path = folder / "zoo.db"
    body = {"architecture": "mlp", "hash_reason": None, "parent": None, "facts": {"accuracy": 0.5, "tags": ["a"]},
            "source": "x", "added": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    catalogue = Catalogue(path)
    with catalogue.writing():
        for n, base in ((0, None), (1, "0" * 64)):
            catalogue.add_content(
                Content(str(n) * 64, "b" * 63 + str(n), 100, base, str(n) * 64, "c" * 16, 10, "float32", 40)
            )
            catalogue.add_model(Model(f"net {n}", str(n) * 64, None, b"\0" * 1024, None, None, body))
    catalogue._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    catalogue.close()
    sample = path.read_bytes()
    for beside in ("-wal", "-shm"):
        Path(f"{path}{beside}").unlink(missing_ok=True)

    def damage(sample: bytes, rng: Random) -> bytes:
        if rng.random() < 0.3:
            return mutate.octets(sample, rng)
        path.write_bytes(sample)
        db = sqlite3.connect(path, isolation_level=None)
        table, columns = rng.choice((("contents", 9), ("models", 7)))
        start = 0 if table == "contents" else 1
        names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")][start:]
        row = list(db.execute(f"SELECT {', '.join(names)} FROM {table} LIMIT 1").fetchone())[:columns]
        at = rng.randrange(columns)
        if names[at] == "body" and rng.random() < 0.9:
            row[at] = mutate.written(mutate.tree(json.loads(row[at]), rng), rng)
        else:
            row[at] = rng.choice(
                (None, b"", b"\xff" * 7, "", "x" * 100, "\0", -1, 2**62, 0.5, float("inf"), row[rng.randrange(columns)])
            )
        with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
            sets = ", ".join(f"{name} = ?" for name in names[: columns + 1])
            db.execute(f"UPDATE {table} SET {sets} WHERE rowid IN (SELECT rowid FROM {table} LIMIT 1)"
                       if table == "models" else f"UPDATE {table} SET {sets} WHERE {names[0]} = '{'0' * 64}'",
                       _summed(tuple(row)))  # fmt: skip
        db.close()
        return path.read_bytes()

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        for beside in ("-wal", "-shm", "-journal"):
            Path(f"{path}{beside}").unlink(missing_ok=True)
        held = Catalogue(path)
        try:
            held.damages(), held.bases(), held.blobs(), held.beside(), held.n_models(), held.find_digests("00")
            for name in held.names():
                held.model(name)
            return held.cards()
        finally:
            held.close()

    return Format(
        "catalogue",
        1,
        [sample],
        damage,
        read,
        lambda _, cards: [c.name for c in cards] == ["net 0", "net 1"],
        lambda sample: sample,
        lambda cards, _: all(isinstance(json.dumps(c.facts), str) for c in cards),
    )


def index_format(folder: Path) -> Format:
    vectors = np.random.default_rng(0).random((7, 4)).astype(np.float32)
    index = Index(4)
    index.add([f"n{i}" for i in range(7)], vectors)
    index.save(folder / "index.npz")
    with np.load(folder / "index.npz") as held:
        parts = {name: held[name] for name in held.files}

    def legal(parts: dict[str, Any]) -> bytes:
        out = io.BytesIO()
        np.savez(out, **parts)
        return out.getvalue()

    def damage(parts: dict[str, Any], rng: Random) -> bytes:
        parts = dict(parts)
        name = rng.choice(list(parts))
        if rng.random() < 0.3:
            return mutate.octets(legal(parts), rng)
        if rng.random() < 0.5:
            data = mutate.octets(parts[name].tobytes(), rng)
            size = parts[name].itemsize
            parts[name] = np.frombuffer(data[: len(data) // size * size], parts[name].dtype)
        else:
            parts[name] = rng.choice(
                (np.zeros(0), np.zeros((2, 3), np.int8), parts[name][::-1], np.array(1), np.array(["a"]))
            )
        return legal(parts)

    def holds(found: Index, _: bytes) -> bool:
        near = found.search(np.zeros(found.dim, np.float32), 3)
        return all(name in found for name, _ in near) and len(found) == len(found.names())

    return Format("zoo index", 1, [parts], damage, through(folder, "index.npz", Index.load),
                  lambda _, found: len(found) == 7, legal, holds)  # fmt: skip
