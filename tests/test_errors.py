"""The exception tree: one root, one message form, and errors that survive a process boundary."""

from __future__ import annotations

import inspect
import pickle

import pytest

from weightfold import errors

EVERY = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]


def test_the_tree_has_one_root() -> None:
    assert len(EVERY) > 5
    assert all(issubclass(cls, errors.WeightfoldError) for cls in EVERY)
    assert all(cls.__doc__ for cls in EVERY)


@pytest.mark.parametrize("cls", EVERY)
def test_the_remedy_stands_on_its_own_line(cls: type[errors.WeightfoldError]) -> None:
    assert str(cls("'fc.weight' has 3 columns.")) == "'fc.weight' has 3 columns."
    told = cls("'fc.weight' has 3 columns.", remedy="Pass 4.")
    assert str(told).splitlines() == ["'fc.weight' has 3 columns.", "  -> Pass 4."]
    assert (told.message, told.remedy) == ("'fc.weight' has 3 columns.", "Pass 4.")


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_survives_pickling_with_its_remedy(cls: type[errors.WeightfoldError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("what", remedy="how")))
    assert type(copy) is cls
    assert str(copy) == "what\n  -> how"


def test_one_except_clause_catches_them_all() -> None:
    for cls in EVERY:
        with pytest.raises(errors.WeightfoldError, match="what"):
            raise cls("what")
