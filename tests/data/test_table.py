"""Tables: headers, kinds of columns, targets, and what can be wrong with a cell."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightfold.data import Dataset, load
from weightfold.data.table import Column, encode, is_number_table, read_table, understand
from weightfold.errors import DataError
from weightfold.models import Classes, Regression


def write(path: Path, header: str | None, rows: list[str]) -> Path:
    path.write_text("\n".join([*([header] if header else []), *rows]) + "\n")
    return path


def numbers(n: int = 30) -> list[str]:
    return [f"{i},{i * i},{i / 7:.3f}" for i in range(n)]


def rows_of(data: Dataset) -> torch.Tensor:
    return torch.cat(
        [torch.cat([s.inputs, s.targets.float().view(len(s), -1)], 1) for s in (data.train, data.val, data.test)]
    )


def test_the_last_column_is_the_target(tmp_path: Path) -> None:
    data = load(write(tmp_path / "t.csv", "a, b ,c", numbers()))
    assert data.task.input.shape == (2,)
    assert data.task.output == Regression(n_targets=1)
    assert (len(data.train), len(data.val), len(data.test)) == (22, 2, 6)
    found = rows_of(data)
    expected = torch.tensor([[float(x) for x in row.split(",")] for row in numbers()])
    torch.testing.assert_close(found[found[:, 0].argsort()], expected)


@pytest.mark.parametrize("target", ["b", 1, -2])
def test_the_target_by_name_or_number(tmp_path: Path, target: str | int) -> None:
    found = rows_of(load(write(tmp_path / "t.csv", "a,b,c", numbers()), target=target))
    torch.testing.assert_close(found[:, 2], found[:, 0] ** 2)


@pytest.mark.parametrize("divider", [",", ";", "\t", " ", "  \t "])
@pytest.mark.parametrize("header", [True, False])
def test_dividers_and_headers_are_recognised(tmp_path: Path, divider: str, header: bool) -> None:
    lines = [row.replace(",", divider) + ("  " if divider == " " else "") for row in numbers(5)]
    table = read_table(write(tmp_path / "t.csv", divider.join("abc") if header else None, lines))
    assert table.names == (("a", "b", "c") if header else ("column 0", "column 1", "column 2"))
    assert table.rows == [row.split(",") for row in numbers(5)]


def test_a_byte_order_mark_quotes_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes('\ufeff"a",b\r\n\r\n"x, y",1\r\nz,2\r\n'.encode())
    table = read_table(tmp_path / "t.csv")
    assert table.names == ("a", "b")
    assert table.rows == [["x, y", "1"], ["z", "2"]]
    assert table.places[0].startswith("row 1 (line 3) of ")


def test_text_becomes_one_column_a_value(tmp_path: Path) -> None:
    rows = [f"{'MFI'[i % 3]},{i},{i / 3:.2f}" for i in range(30)]
    data = load(write(tmp_path / "t.csv", "sex,n,y", rows))
    assert data.task.input.shape == (4,)
    inputs, _ = next(data.batches("train", 100))
    assert set(inputs[:, :3].unique().tolist()) == {0, 1}
    assert inputs[:, :3].sum(1).unique().tolist() == [1]


def test_a_text_that_training_lacks_is_all_zeros() -> None:
    column = Column("x", "category", np.array(["a", "b", "c", "a"]))
    assert encode(column, torch.tensor([0, 1])).tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]


def test_dates_become_time_and_three_cycles() -> None:
    cells = ["1970-01-01 06:00:00", "1970-01-05T00:00:00+00:00", "1971-01-01"]
    features = encode(understand("when", cells, cells), torch.arange(3))
    # Reference by hand: 1 January 1970 was a Thursday, weekday 3 of 0..6.
    assert features[:, 0].tolist() == [0.25, 4, 365]
    expected = [
        math.sin(math.pi / 2),
        math.sin(2 * math.pi * 3 / 7),
        0,
        math.cos(math.pi / 2),
        math.cos(2 * math.pi * 3 / 7),
        1,
    ]
    torch.testing.assert_close(features[0, 1:], torch.tensor(expected), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(features[1, 2], torch.tensor(0.0), atol=1e-6, rtol=0)  # a Monday


@given(st.datetimes().map(lambda moment: moment.replace(microsecond=0)))
def test_every_date_is_understood(moment) -> None:
    features = encode(understand("when", [moment.isoformat()], ["here"]), torch.arange(1))
    assert features.shape == (1, 7)
    assert features[:, 1:].abs().max() <= 1
    torch.testing.assert_close(features[0, 1:4] ** 2 + features[0, 4:] ** 2, torch.ones(3))


@pytest.mark.parametrize(
    ("targets", "output"),
    [
        (["yes", "no"] * 10, Classes(n=2)),
        (["1", "0"] * 10, Classes(n=2)),
        (["1.0", "0.0"] * 10, Classes(n=2)),
        ([str(i) for i in range(21)], Regression()),
        (["0.5", "1.5"] * 10, Regression()),
    ],
)
def test_the_target_tells_the_kind_of_task(tmp_path: Path, targets: list[str], output: Classes | Regression) -> None:
    rows = [f"{i},{target}" for i, target in enumerate(targets)]
    assert load(write(tmp_path / "t.csv", "x,y", rows)).task.output == output


def test_the_kind_of_task_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "x,y", [f"{i},{10 * (i % 2)}" for i in range(20)])
    assert load(path, output="regression").task.output == Regression()
    data = load(path)
    assert data.classes == ("0", "10")
    assert torch.equal(data.train.targets, data.train.inputs[:, 0].long() % 2)


def test_columns_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "id,x,y", [f"name {i},{i},{i / 3}" for i in range(300)])
    with pytest.raises(DataError, match=r"Column 'id' holds 216 different|'id' holds .* different texts"):
        load(write(tmp_path / "u.csv", "id,x,y", [f"name {i},{i},{i / 3}" for i in range(400)]))
    assert load(path, drop=("id",)).task.input.shape == (1,)
    assert load(path, drop=(0,)).fingerprint == load(path, drop=("id",)).fingerprint


def test_the_test_table_beside_is_found(tmp_path: Path) -> None:
    write(tmp_path / "t-test.csv", "a,b,c", ["100,2,0.5", "101,3,0.7"])
    data = load(write(tmp_path / "t-train.csv", "a,b,c", numbers()))
    assert data.test.inputs[:, 0].tolist() == [100, 101]
    write(tmp_path / "t-test.csv", "a,x,c", ["100,2,0.5"])
    with pytest.raises(DataError, match=r"must have the columns of the training table, a, b, c. Got a, x, c"):
        load(tmp_path / "t-train.csv")


def test_numbers_with_blanks_in_a_txt_are_a_table(tmp_path: Path) -> None:
    rows = [row.replace(",", " \t") + " " for row in numbers()]
    data = load(write(tmp_path / "t.txt", None, rows), target=2)
    assert data.task.output == Regression()
    assert data.fingerprint == load(write(tmp_path / "u.csv", "a,b,c", numbers())).fingerprint


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("1 2\n3 4\n", True),
        ("1 2\n3\n", False),
        ("1\n2\n", False),
        ("", False),
        ("\n 1 2 \n\n3 4", True),
        ("1 x\n", False),
    ],
)
def test_what_counts_as_a_table_of_numbers(text: str, table: bool) -> None:
    assert is_number_table(text) is table


MISSING = "row 2 (line 3) of"


@pytest.mark.parametrize(
    ("rows", "settings", "complaints"),
    [
        (["1,2", "nan,3", "4,5"], {}, ["A value is missing", MISSING, "column 'a': 'nan'"]),
        (["1,2", ",3", "4,5"], {}, ["A value is missing", MISSING, "column 'a': ''"]),
        (["1,2", "3,?", "4,5"], {}, ["A value is missing", MISSING, "column 'b': '?'"]),
        (["1,2", "inf,3", "4,5"], {}, ["Column 'a' holds numbers", MISSING, "has 'inf'"]),
        (["1,2", "1e300,3", "4,5"], {}, ["Column 'a' holds numbers", MISSING, "has '1e300'"]),
        (["1,2", "x,3", "4,5"], {}, ["Column 'a' holds numbers", MISSING, "has 'x'"]),
        (["1,2", "3", "4,5"], {}, ["must have 2 cells", "Got 1", MISSING]),
        (["1,2", "3,4,5"], {}, ["must have 2 cells", "Got 3", MISSING]),
        (["1,2", "3,4", "5,6"], {"target": "c"}, ["no column 'c'", "'target'", "Valid: a, b"]),
        (["1,2", "3,4", "5,6"], {"target": 2}, ["no column 2", "it has 2 columns"]),
        (["1,2", "3,4", "5,6"], {"drop": ("a",)}, ["must keep its target and at least one feature"]),
        (["1,x", "3,y", "5,x"], {"output": "regression"}, ["A regression needs numbers", "'b'", "holds x"]),
        (["1,x", "3,x", "5,x"], {}, ["one class only: 'x'"]),
        (["1,x", "3,y", "5,x"], {}, ["Class 'x'", "need 3"]),
        (["1,2.5", "3,4"], {}, ["has 2 of the samples read", "need 3"]),
        ([], {}, ["has a header and no rows"]),
    ],
)
def test_bad_tables_say_where(tmp_path: Path, rows: list[str], settings: dict, complaints: list[str]) -> None:
    path = write(tmp_path / "t.csv", "a,b", rows)
    with pytest.raises(DataError) as caught:
        load(path, **settings)
    assert all(part in str(caught.value) for part in complaints), str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"a\n1\n2\n", "a single column"),
        (b"a,b\n\xff\xfe,1\n", "no text in UTF-8.*\n.*Convert"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        load(tmp_path / "t.csv")
