"""The other formats that `file_fuzz` damages: texts, tables, checkpoints, programs; see `file_formats`."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

import file_mutations as mutate
import torch
from file_formats import (
    Format,
    blob_format,
    catalogue_format,
    clustered_format,
    codes_format,
    delta_format,
    equal,
    header_format,
    index_format,
    packed_format,
    saved_format,
    small,
    structure_format,
    symmetries_format,
    through,
)  # fmt: skip
from torch import Tensor, nn

import weightfold
from weightfold.artifact.format import Builder, Input
from weightfold.blueprint import Blueprint
from weightfold.data import load as load_data
from weightfold.data.checkpoint import read_tensors
from weightfold.data.foreign import read_config
from weightfold.export import Source
from weightfold.export.card import run_facts
from weightfold.export.embedded import program_module, program_text
from weightfold.ledger.entry import GENESIS, Entry, aside_checksum, chain_hash, to_json
from weightfold.ode.files import dumps, loads
from weightfold.runtime.graphs import graph_module
from weightfold.runtime.opened import program_of
from weightfold.zoo.exchange.readme import front_matter

# texts ----------------------------------------------------------------------------------------------------------------


def ledger_format(folder: Path) -> Format:
    source, target = folder / "l.jsonl", folder / "l.db"
    with weightfold.Ledger.create(folder / "made.db", {"seed": 0}) as made:
        made.append("note", {"text": "x", "n": [1, 2.5, None]}, aside={"host": "a"})
        made.export_jsonl(source)
    (folder / "made.db").unlink()
    sample = source.read_text()

    def resealed(records: list[Any]) -> str:
        """Hashes, checksums and counts made right, where the values let it be."""
        prev, out = GENESIS, []
        for record in records:
            with contextlib.suppress(Exception):
                if record.get("record") == "entry":
                    record["prev"] = prev
                    record["hash"] = chain_hash(record["seq"], record["kind"], to_json(record["body"]), prev)
                    record["checksum"] = aside_checksum(record["seq"], record["time"], to_json(record["aside"]))
                    prev = record["hash"]
                if record.get("record") == "end":
                    record["head"] = prev
            out.append(record)
        return "\n".join(json.dumps(record) for record in out) + "\n"

    def damage(sample: str, rng: Random) -> bytes:
        if rng.random() < 0.3:
            return mutate.text(sample, rng).encode("utf-8", "surrogatepass")
        records = [json.loads(line) for line in sample.splitlines()]
        at = rng.randrange(len(records))
        records[at] = mutate.tree(records[at], rng)
        text = resealed(records)
        return (mutate.written(json.loads(text), rng) if text.count("\n") == 1 else text).encode(
            "utf-8", "surrogatepass"
        )

    def read(data: bytes) -> Any:
        source.write_bytes(data)
        target.unlink(missing_ok=True)
        with weightfold.Ledger.import_jsonl(source, target) as ledger:
            return list(ledger.entries())

    def holds(entries: list[Entry], _: bytes) -> bool:
        return all(entry.hash == entry.compute_hash() for entry in entries)

    return Format("ledger lines", 2, [sample], damage, read, lambda _, entries: len(entries) == 2,
                  lambda sample: sample.encode(), holds)  # fmt: skip


MODELS = (
    "begin model m\n begin parameters\n  k = 2\n end parameters\n begin init\n"
    "  A = 1\n  B = k/2\n end init\n begin ODE\n"
    "  d(A) = -k*A^2 + 3e-1*B\n  d(B) = A*(1 - B)/4\n end ODE\nend model\n",
    "begin model m\n begin init\n  A = 1\n  B = 2\n end init\n begin partition {A,B} end partition\n begin reactions\n"
    "  A + 2*B -> B, 0.5\n  B -> A, 1\n end reactions\n begin views\n  v = A + B\n end views\nend model\n",
)


def equations_format() -> Format:
    def damage(sample: str, rng: Random) -> bytes:
        for _ in range(rng.choice((1, 1, 2, 5))):
            sample = mutate.text(sample, rng)
        return sample.encode("utf-8", "surrogatepass")

    def read(data: bytes) -> Any:
        return loads(data.decode("utf-8", "surrogatepass"))

    def holds(model: Any, _: bytes) -> bool:
        again = loads(dumps(model.system)).system
        return again.terms() == model.system.terms() and again.start() == model.system.start()

    return Format("equations", 12, list(MODELS), damage, read, lambda _, model: model.system.n_variables == 2,
                  str.encode, holds)  # fmt: skip


CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "id2label": {"0": "a"},
    "text_config": {"rope": {"type": "x", "factor": 2.0}},
    "auto_map": None,
}


def config_format(folder: Path) -> Format:
    def damage(sample: Any, rng: Random) -> bytes:
        return mutate.written(mutate.tree(sample, rng), rng).encode("utf-8", "surrogatepass")

    return Format("config.json", 15, [CONFIG], damage, through(folder, "config.json", read_config),
                  lambda sample, found: found == sample, lambda sample: json.dumps(sample).encode(),
                  lambda found, data: found == json.loads(data))  # fmt: skip


RUN = {
    "kind": "train",
    "config": {"method": "fold", "data": "digits", "limit": None},
    "data": {"name": "digits", "fingerprint": "a", "samples": {"train": 3}},
    "results": {
        "score": "accuracy",
        "arms": {"dense": {"score": 0.5, "parameters": 3}, "folded": {"score": 0.4, "parameters": 2}},
    },
}


def card_format(folder: Path) -> Format:
    def damage(sample: Any, rng: Random) -> bytes:
        return mutate.written(mutate.tree(sample, rng), rng).encode("utf-8", "surrogatepass")

    return Format(
        "cards",
        12,
        [RUN],
        damage,
        through(folder, "run.json", lambda path: run_facts(path.parent)),
        lambda _, found: found["score"] == "accuracy",
        lambda sample: json.dumps(sample).encode(),
    )


def readme_format() -> Format:
    sample = "---\nlicense: mit\nbase_model:\n- org/base\ntags: [a, 'b']\nx: {y: 1}\n---\n# Title"

    def damage(sample: str, rng: Random) -> bytes:
        return mutate.text(mutate.text(sample, rng), rng).encode("utf-8", "surrogatepass")

    return Format(
        "readme",
        15,
        [sample],
        damage,
        lambda data: front_matter(data.decode("utf-8", "surrogatepass")),
        lambda _, found: found["license"] == "mit",
        str.encode,
        lambda found, _: isinstance(found, dict),
    )


def table_format(folder: Path) -> Format:
    rng = Random(0)
    out = io.StringIO()
    rows = [[rng.random(), rng.choice("ab"), f"2024-01-{n % 27 + 1:02d}", n % 2] for n in range(30)]
    csv.writer(out).writerows([["x", "kind", "day", "y"], *rows])

    def damage(sample: str, draw: Random) -> bytes:
        if draw.random() < 0.3:
            return mutate.octets(sample.encode(), draw)
        return mutate.text(sample, draw).encode("utf-8", "surrogatepass")

    def holds(found: Any, _: bytes) -> bool:
        return bool(found.train.inputs.isfinite().all()) and len(found.train.inputs) == len(found.train.targets)

    return Format("table", 1.5, [out.getvalue()], damage, through(folder, "t.csv", load_data),
                  lambda _, found: found.train.inputs.shape[1] == 10, str.encode, holds)  # fmt: skip


def parquet_format(folder: Path) -> Format | None:
    try:
        import pyarrow
        import pyarrow.parquet as writer
        from PIL import Image
    except ImportError:
        return None
    images = []
    for n in range(12):
        out = io.BytesIO()
        Image.new("L", (4, 4), n * 20).save(out, "PNG")
        images.append({"bytes": out.getvalue()})
    table = pyarrow.table({"image": images, "label": [n % 2 for n in range(12)]})
    out = io.BytesIO()
    writer.write_table(table, out)

    def holds(found: Any, _: bytes) -> bool:
        return len(found.train.inputs) == len(found.train.targets)

    return Format("parquet", 0.6, [out.getvalue()], mutate.octets, through(folder, "p.parquet", load_data),
                  lambda _, found: found.task.output.n == 2, lambda sample: sample, holds)  # fmt: skip


# checkpoints and programs ---------------------------------------------------------------------------------------------


class Planted:
    """Calls a function that a name in a pickle stands for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, (mutate.MARK,)


def checkpoint_format(folder: Path) -> Format:
    state = small(2)
    contents = [({"model": state, "epoch": 3, "optimizer": {"state": {0: {"a": torch.zeros(2)}}}}, state),
                ({f"module.{name}": value for name, value in state.items()}, state)]  # fmt: skip
    samples = []
    for content, wanted in contents:
        out = io.BytesIO()
        torch.save(content, out)
        with zipfile.ZipFile(out) as archive:
            samples.append(({name: archive.read(name) for name in archive.namelist()}, wanted))
    planted = pickle.dumps({"w": Planted()}, 2)

    def legal(sample: Any) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in sample[0].items():
                archive.writestr(name, data)
        return out.getvalue()

    def damage(sample: Any, rng: Random) -> bytes:
        parts, name = dict(sample[0]), rng.choice(list(sample[0]))
        name = next(n for n in parts if n.endswith("data.pkl")) if rng.random() < 0.8 else name
        parts[name] = planted if rng.random() < 0.02 else mutate.octets(parts[name], rng, planted)
        return legal((parts, None)) if rng.random() < 0.97 else mutate.octets(legal(sample), rng)

    def holds(found: Any, _: bytes) -> bool:
        return all(isinstance(value, Tensor) for value in found.values())

    return Format("checkpoint", 3, samples, damage, through(folder, "c.pt", read_tensors),
                  lambda sample, found: equal(found, sample[1]), legal, holds)  # fmt: skip


def small_program() -> tuple[nn.Module, bytes]:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Flatten(1)).eval()
    out = io.BytesIO()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.export.save(torch.export.export(net, (torch.ones(4, 3),), dynamic_shapes=shapes), out)
    return net, out.getvalue()


def program_format() -> Format:
    net, data = small_program()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sample = {name: archive.read(name) for name in archive.namelist()}

    def legal(parts: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        return out.getvalue()

    def damage(parts: dict[str, bytes], rng: Random) -> bytes:
        parts = dict(parts)
        name = rng.choice([n for n in parts if n.endswith(".json")] * 4 + list(parts))
        if name.endswith(".json"):
            tree = mutate.tree(json.loads(parts[name]), rng)
            parts[name] = mutate.written(tree, rng).encode("utf-8", "surrogatepass")
        else:
            parts[name] = mutate.octets(parts[name], rng)
        return legal(parts) if rng.random() < 0.97 else mutate.octets(legal(parts), rng)

    def read(data: bytes) -> Any:
        return graph_module(program_of(data, "net.pt2"))

    def whole(_: Any, module: Any) -> bool:
        x = torch.randn(5, 3)
        return torch.equal(module(x), net(x))

    return Format("program", 0.5, [sample], damage, read, whole, legal)


def embedded_format() -> Format:
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    source = Source(net, (Input(shape=(2, 3)),), Blueprint.of(net), Builder(kind="instance", name="Net"))
    text = program_text(source)
    assert text is not None
    tensors = dict(net.state_dict())

    def damage(text: str, rng: Random) -> bytes:
        archive = zlib.decompress(base64.b64decode(text))
        with zipfile.ZipFile(io.BytesIO(archive)) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        name = "archive/models/model.json"
        parts[name] = mutate.written(mutate.tree(json.loads(parts[name]), rng), rng).encode("utf-8", "surrogatepass")
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as new:
            for key, part in parts.items():
                new.writestr(key, part)
        data = out.getvalue() if rng.random() < 0.8 else mutate.octets(archive, rng)
        short = zlib.compress(data, 1)
        return base64.b64encode(short if rng.random() < 0.95 else mutate.octets(short, rng))

    def whole(_: Any, module: Any) -> bool:
        x = torch.randn(5, 3)
        return torch.equal(module(x), net(x))

    return Format("embedded program", 0.4, [text], damage,
                  lambda data: program_module(data.decode("latin1"), tensors, "file"), whole, str.encode)  # fmt: skip


def all_formats(folder: Path) -> list[Format]:
    """Every format, its samples made anew."""
    found = [
        packed_format(), codes_format(), header_format(), structure_format(), saved_format(folder),
        clustered_format(folder), delta_format(), blob_format(), symmetries_format(), catalogue_format(folder),
        index_format(folder),
        ledger_format(folder), equations_format(), config_format(folder), card_format(folder), readme_format(),
        table_format(folder), parquet_format(folder), checkpoint_format(folder), program_format(), embedded_format(),
    ]  # fmt: skip
    return [one for one in found if one is not None]
