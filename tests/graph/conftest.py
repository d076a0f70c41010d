"""In these tests an exception inside an operator's rule is a failure, not a reason to freeze."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from weightfold.graph.trace import RULES_MUST_NOT_FAIL


@pytest.fixture(autouse=True)
def rules_must_not_fail() -> Iterator[None]:
    token = RULES_MUST_NOT_FAIL.set(True)
    yield
    RULES_MUST_NOT_FAIL.reset(token)
