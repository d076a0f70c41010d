"""Tables: cells to columns, columns to numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from math import pi
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from weightfold.config import nearest
from weightfold.data.dataset import Dataset, Scaling, Split
from weightfold.data.options import LoadOptions
from weightfold.data.splits import Plan, plan_splits
from weightfold.errors import DataError
from weightfold.models.task import Classes, Regression, TableInput, TaskSpec

_MISSING = frozenset({"", "nan", "na", "n/a", "null", "?"})
_MOST_CATEGORIES = 256
_LARGEST = float(np.finfo(np.float32).max)
_MOST_NUMBERED_CLASSES = 20


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Args:
        names: of the columns; 'column 0', 'column 1', ... without a header.
        rows: cells of each row, all of the same number.
        places: where each row stands, for errors.
    """

    names: tuple[str, ...]
    rows: list[list[str]]
    places: list[str]


@dataclass(frozen=True)
class Column:
    """One column, understood: float64 numbers, datetime64 dates, or text."""

    name: str
    kind: Literal["number", "date", "category"]
    values: np.ndarray


def load_table(path: Path, test_path: Path | None, options: LoadOptions) -> Dataset:
    """Read a table, or a training and a test table, into numbers.

    Numbers stay. Dates become seven numbers: days since 1970; sine and cosine of the time of day, of the weekday and of
    the day of the year. Text becomes one column for each value that the training rows hold.

    Raises:
        DataError: no or ragged rows, an empty or non-finite cell, text among numbers, an unknown target column.
    """
    table = read_table(path, options.header)
    n_train = len(table.rows)
    if test_path is not None:
        table = _append(table, read_table(test_path, options.header))
    target, features = _columns(table, options, path)
    labels, targets, classes = _understand_target(target, options, path)
    test_labels = None if test_path is None else labels[n_train:]
    plan = plan_splits(labels[:n_train], test_labels, classes=classes, options=options, source=path.name)
    if test_path is not None:
        plan = plan._replace(test=plan.test + n_train)
    inputs = torch.cat([encode(column, plan.train) for column in features], dim=1)
    return _table_dataset(path.stem, inputs, targets, plan, classes)


def _table_dataset(name: str, inputs: Tensor, targets: Tensor, plan: Plan, classes: tuple[str, ...]) -> Dataset:
    output = Classes(n=len(classes)) if classes else Regression(n_targets=1)
    train, val, test = (Split(inputs[idx], targets[idx]) for idx in plan)
    return Dataset(
        name,
        TaskSpec(input=TableInput(n_features=inputs.shape[1]), output=output),
        train,
        val,
        test,
        classes,
        input_scaling=Scaling.of(train.inputs),
        target_scaling=None if classes else Scaling.of(train.targets),
    )


def is_number_table(text: str) -> bool:
    """Tell whether the first lines of a text are rows of as many numbers each, at least two, with blanks between.

    Example:
        >>> is_number_table("1.0 2 3\\n4 5 6e-1\\n"), is_number_table("To be,\\nor not")
        (True, False)
    """
    rows = [line.split() for line in text[:20_000].splitlines()[:20] if line.strip()]
    return bool(rows) and len(rows[0]) > 1 and all(len(row) == len(rows[0]) and _all_numbers(row) for row in rows)


def read_table(path: Path, header: bool | None = None) -> Table:
    """Read cells divided by commas, semicolons, tabs, or blanks, whichever the first line has.

    Args:
        path: a text file in UTF-8.
        header: whether the first row names the columns; by default it does if it holds no number and no date.
    Returns:
        table: at least one row.
    Raises:
        DataError: no rows, a single column, or rows of different lengths.
    """
    lines = [(number, row) for number, row in _read_rows(path) if any(row)]
    if not lines:
        raise DataError(f"The table '{path}' is empty.", remedy="Pass a file with at least a few rows.")
    first = lines[0][1]
    if len(first) < 2:
        raise DataError(
            f"'{path}' has a single column in its first line.",
            remedy="Divide the cells by commas, semicolons, tabs or blanks; a table needs a feature and a target.",
        )
    named = not any(_number(cell) is not None or _date(cell) is not None for cell in first)
    if named if header is None else header:
        names, lines = tuple(cell or f"column {i}" for i, cell in enumerate(first)), lines[1:]
    else:
        names = tuple(f"column {i}" for i in range(len(first)))
    if not lines:
        raise DataError(f"The table '{path}' has a header and no rows.", remedy="Pass a file with at least a few rows.")
    places = [f"row {row} (line {number}) of '{path}'" for row, (number, _) in enumerate(lines, start=1)]
    for (_, row), place in zip(lines, places, strict=True):
        if len(row) != len(names):
            raise DataError(
                f"All rows must have {len(names)} cells, as the first line of '{path}' has. Got {len(row)} in {place}.",
                remedy="Correct that row; text that holds the divider must stand in double quotes.",
            )
    return Table(names, [row for _, row in lines], places)


def understand(name: str, cells: Sequence[str], places: Sequence[str]) -> Column:
    """Find out whether a column holds numbers, dates or text.

    Args:
        name: of the column.
        cells: its text.
        places: where each cell stands, for errors.
    Returns:
        column: of numbers if all cells are; of dates if all are in ISO 8601; else of text.
    Raises:
        DataError: a cell is empty or not finite, or text stands among numbers.
    Example:
        >>> understand("day", ["2024-02-29", "2024-03-01"], ["row 1", "row 2"]).kind
        'date'
    """
    for cell, place in zip(cells, places, strict=True):
        if cell.lower() in _MISSING:
            raise DataError(
                f"A value is missing in {place}, column '{name}': {cell!r}.",
                remedy="Fill it in, remove the row, or leave the column out with drop=(...,).",
            )
    numbers = [_number(cell) for cell in cells]
    n_numbers = sum(number is not None for number in numbers)
    if 2 * n_numbers > len(cells):
        _check_numbers(name, cells, places, numbers)
        return Column(name, "number", np.array(numbers, dtype=np.float64))
    if n_numbers == 0 and cells and _date(cells[0]) is not None and all(_date(cell) is not None for cell in cells):
        return Column(name, "date", np.array([_date(cell) for cell in cells], dtype="datetime64[s]"))
    return Column(name, "category", np.array(cells, dtype=np.str_))


def encode(column: Column, fit_idx: Tensor) -> Tensor:
    """Turn a column into features.

    Args:
        column: S cells.
        fit_idx: the training rows; text found only elsewhere becomes all zeros.
    Returns:
        features: shape (S, F), float32.
    Raises:
        DataError: the training rows hold more different texts than a column each is good for.
    Example:
        >>> encode(Column("sex", "category", np.array(["M", "F", "I"])), torch.tensor([0, 1]))
        tensor([[0., 1.],
                [1., 0.],
                [0., 0.]])
    """
    if column.kind == "number":
        return torch.from_numpy(column.values).float().unsqueeze(1)
    if column.kind == "date":
        return torch.from_numpy(_encode_dates(column.values)).float()
    categories = np.unique(column.values[fit_idx.numpy()])
    if len(categories) > _MOST_CATEGORIES:
        raise DataError(
            f"Column '{column.name}' holds {len(categories)} different texts; at most {_MOST_CATEGORIES} are encoded.",
            remedy=f"Leave it out with drop=('{column.name}',). Write a date as 2024-02-29 or 2024-02-29 23:59:59.",
        )
    return torch.from_numpy(column.values[:, None] == categories).float()


def _encode_dates(dates: np.ndarray) -> np.ndarray:
    days = dates.astype("datetime64[D]")
    since_1970 = dates.astype(np.int64) / 86_400
    of_year = (days - dates.astype("datetime64[Y]").astype("datetime64[D]")).astype(np.int64)
    of_week = (days.astype(np.int64) + 3) % 7  # 1 January 1970 was a Thursday
    turns = np.stack([since_1970 % 1, of_week / 7, of_year / 365.25], axis=1) * (2 * pi)
    return np.concatenate([since_1970[:, None], np.sin(turns), np.cos(turns)], axis=1)


def _read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of each line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        divider = _divider(next((line for line in file if line.strip()), ""))
        file.seek(0)
        if divider is None:
            yield from ((number, line.split()) for number, line in enumerate(file, start=1))
            return
        reader = csv.reader(file, delimiter=divider, skipinitialspace=True)
        try:
            for row in reader:
                yield reader.line_num, [cell.strip() for cell in row]
        except csv.Error as error:
            raise DataError(f"Line {reader.line_num} of '{path}' is no row of a table: {error}.") from None


def _divider(line: str) -> str | None:
    best = max(",;\t", key=line.count)
    return best if best in line.strip() else None


def _append(table: Table, test: Table) -> Table:
    if table.names != test.names:
        raise DataError(
            f"The test table must have the columns of the training table, {', '.join(table.names)}. "
            f"Got {', '.join(test.names)} in {test.places[0]}.",
            remedy="Give both files the same header.",
        )
    return Table(table.names, table.rows + test.rows, table.places + test.places)


def _columns(table: Table, options: LoadOptions, path: Path) -> tuple[Column, list[Column]]:
    """The target column and the feature columns."""
    dropped = {_position(table, which, "drop", path) for which in options.drop}
    kept = [i for i in range(len(table.names)) if i not in dropped]
    target = kept[-1:] if options.target is None else [_position(table, options.target, "target", path)]
    if len(kept) < 2 or target[0] in dropped:
        raise DataError(f"'{path}' must keep its target and at least one feature.", remedy="Drop fewer columns.")
    columns = {i: understand(table.names[i], [row[i] for row in table.rows], table.places) for i in kept}
    return columns.pop(target[0]), list(columns.values())


def _position(table: Table, which: int | str, setting: str, path: Path) -> int:
    if isinstance(which, str) and which in table.names:
        return table.names.index(which)
    if isinstance(which, int) and -len(table.names) <= which < len(table.names):
        return which % len(table.names)
    raise DataError(
        f"'{path}' has no column {which!r}, which '{setting}' asks for; it has {len(table.names)} columns.",
        remedy=nearest(str(which), table.names),
    )


def _understand_target(column: Column, options: LoadOptions, path: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Class of each row (zero for a regression), targets, class names (none for a regression)."""
    if not _is_classes(column, options):
        if column.kind != "number":
            raise DataError(
                f"A regression needs numbers; the target '{column.name}' of '{path}' holds {column.values[0]!s}.",
                remedy="Choose another column with target=, or output='classes'.",
            )
        targets = torch.from_numpy(column.values).float().unsqueeze(1)
        return torch.zeros(len(targets), dtype=torch.int64), targets, ()
    values, labels = np.unique(column.values, return_inverse=True)
    names = tuple(f"{value:g}" if column.kind == "number" else str(value) for value in values)
    numbers = torch.from_numpy(labels).long()
    return numbers, numbers, names


def _is_classes(column: Column, options: LoadOptions) -> bool:
    if options.output != "auto":
        return options.output == "classes"
    if column.kind != "number":
        return True
    values = np.unique(column.values)
    return len(values) <= _MOST_NUMBERED_CLASSES and bool((values == values.round()).all())


def _check_numbers(name: str, cells: Sequence[str], places: Sequence[str], numbers: Sequence[float | None]) -> None:
    for cell, place, number in zip(cells, places, numbers, strict=True):
        if number is None or not abs(number) <= _LARGEST:
            raise DataError(
                f"Column '{name}' holds numbers, but {place} has {cell!r}.",
                remedy="Correct it, remove the row, or leave the column out with drop=(...,).",
            )


def _all_numbers(cells: Sequence[str]) -> bool:
    return all(_number(cell) is not None for cell in cells)


def _attempt(read: Callable[[str], float], cell: str) -> float | None:
    with suppress(ValueError):
        return read(cell)
    return None


def _number(cell: str) -> float | None:
    return _attempt(float, cell)


def _date(cell: str) -> datetime | None:
    """The moment that an ISO 8601 date names, in UTC if it names a zone; None for anything else."""
    with suppress(ValueError):
        date = datetime.fromisoformat(cell)
        return date if date.tzinfo is None else date.astimezone(UTC).replace(tzinfo=None)
    return None
