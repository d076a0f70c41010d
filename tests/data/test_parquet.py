"""Parquet files of images, in the layouts that exist, and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfold.data import load
from weightfold.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Encode = Callable[..., bytes]


def write(path: Path, columns: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata or {}), path)
    return path


@pytest.fixture
def images(encode_image: Encode) -> list[bytes]:
    return [encode_image(i) for i in range(20)]


LABELS = [i % 2 for i in range(20)]


def test_bytes_and_class_names_from_the_metadata(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path / "x.parquet", {"image": images, "label": LABELS}, {"classes": "ant,bee,cat"})
    data = load(path)
    assert data.classes == ("ant", "bee", "cat")
    assert data.task.output.width == 3
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


def test_the_structs_and_names_of_hugging_face(tmp_path: Path, images: list[bytes]) -> None:
    structs = [{"bytes": image, "path": None} for image in images]
    features = {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    plain = load(write(tmp_path / "x.parquet", {"image": images, "label": LABELS}, {"classes": "ant,bee"}))
    wrapped = load(write(tmp_path / "y.parquet", {"image": structs, "label": LABELS}, metadata))
    assert wrapped.classes == ("ant", "bee")
    assert wrapped.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([7, 3] * 10, ("3", "7")), (["bee", "ant"] * 10, ("ant", "bee"))],
)
def test_labels_without_names_name_themselves(
    tmp_path: Path, images: list[bytes], labels: list, classes: tuple[str, ...]
) -> None:
    data = load(write(tmp_path / "x.parquet", {"image": images, "label": labels}))
    assert data.classes == classes
    assert set(data.train.targets.tolist()) == {0, 1}


def test_labels_given_as_names_find_their_number(tmp_path: Path, images: list[bytes]) -> None:
    labels = ["bee", "cat"] * 10
    data = load(write(tmp_path / "x.parquet", {"image": images, "label": labels}, {"classes": "ant,bee,cat"}))
    assert set(data.train.targets.tolist()) == {1, 2}


@pytest.mark.parametrize("name", ["x-{}.parquet", "{}-00000-of-00001.parquet"])
def test_the_test_file_beside_is_found(tmp_path: Path, images: list[bytes], name: str) -> None:
    write(tmp_path / name.format("test"), {"image": images[:4], "label": LABELS[:4]})
    path = write(tmp_path / name.format("train"), {"image": images[4:], "label": LABELS[4:]})
    data = load(path)
    assert len(data.test) == 4
    assert len(data.train) + len(data.val) == 16


@pytest.mark.parametrize(
    ("columns", "metadata", "complaint"),
    [
        ({"img": [b"x"], "label": [0]}, {}, "no column 'image'. Columns there: img, label.\n.*Name the"),
        ({"image": [b"x"], "y": [0]}, {}, "no column 'label'. Columns there: image, y"),
        ({"image": [b"x", None], "label": [0, 1]}, {}, "Row 1 of .* holds NoneType in column 'image'"),
        ({"image": [1, 2], "label": [0, 1]}, {}, "Row 0 of .* holds int in column 'image'"),
        ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, {}, "Row 0 of .* not encoded bytes"),
        ({"image": [b"x", b"y"], "label": [0, None]}, {}, "Row 1 of .* has the label None"),
        ({"image": [b"x", b"y"], "label": [0.5, 1.0]}, {}, "Row 0 of .* has the label 0.5"),
        (
            {"image": [b"x", b"y"], "label": [0, 5]},
            {"classes": "a,b"},
            "Row 1 of .* has the label 5; known are 0, a, 1, b",
        ),
        ({"image": [b"x"] * 9, "label": [0] * 9}, {}, "one class only: '0'"),
        ({"image": [b"x"] * 20, "label": LABELS}, {}, "Row .* cannot be read as an image: no known format"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, {}, "is empty"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, columns: dict, metadata: dict, complaint: str) -> None:
    path = write(tmp_path / "x.parquet", columns, metadata)
    with pytest.raises(DataError, match=complaint) as caught:
        load(path)
    assert caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"PAR1 nonsense PAR1", b"a,b\n1,2\n"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"'.*x\.parquet' cannot be read as a parquet file"):
        load(tmp_path / "x.parquet")


def test_a_truncated_file_is_named(tmp_path: Path, images: list[bytes]) -> None:
    path = write(tmp_path / "x.parquet", {"image": images, "label": LABELS})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        load(path)
