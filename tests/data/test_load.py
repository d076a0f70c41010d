"""Whatever bytes a file holds, the door says what is wrong with them in its own words."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from weightfold.data import load
from weightfold.errors import DataError

CELLS = st.sampled_from(
    ["1", "2.5", "-3e4", "x", "", "nan", '"', "2024-01-31", "a,b", "\t", "\x00", "1e999", "1e300", "٣"]
)
TABLES = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=12).map("\n".join)
TEXTS = st.text(max_size=300) | TABLES | TABLES.map(lambda text: text.replace(",", "\t"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".parquet"])
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=300))
@example(content=b"sentence\tlabel")
@example(content=b"sentence\tlabel\na\tb\n")
@example(content=b"a,b\n" + b'"' * 99)
@example(content=b"x" * 200_000 + b",1\n1,2\n")
@example(content=b"0000-00-00,1\n1,2")
@example(content="".join(f"{i},{i}\n" for i in range(5)).encode())
def test_any_bytes_give_data_or_a_data_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with suppress(DataError):
        data = load(path, context=4)
        assert len(data.train) > 0
        assert all(inputs.isfinite().all() for inputs, _ in data.batches("train", 8))


def test_an_unreadable_path_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "x.csv").mkdir()
    with pytest.raises(DataError, match="has no sub-folders"):
        load(tmp_path / "x.csv")
