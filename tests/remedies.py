"""Tables of remedies: what goes wrong, what the second line of the message says, and that this works."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from weightfold.errors import WeightfoldError

Do = Callable[[], Any]
Case = Callable[..., tuple[Do, Do]]


class Table(dict[str, tuple[Case, tuple[str, ...]]]):
    """Cases by name."""

    def remedy(self, *parts: str) -> Callable[[Case], Case]:
        """Enter a case, which makes what goes wrong and what its remedy says; the remedy's text holds all parts."""

        def entered(case: Case) -> Case:
            self[case.__name__] = case, parts
            return case

        return entered

    def follow(self, name: str, tmp_path: Path) -> None:
        """Provoke the error of a case, compare its remedy, and do what it says."""
        case, parts = self[name]
        torch.manual_seed(0)
        wrong, right = case(tmp_path) if inspect.signature(case).parameters else case()
        text = _second_line(wrong)
        assert all(part in text for part in parts), text
        right()


def _second_line(wrong: Do) -> str:
    """The remedy of an error that is raised, or of an event that is refused."""
    try:
        events = wrong()
    except WeightfoldError as error:
        return error.remedy or "none"
    refused = [event for event in events if not event.accepted]
    assert refused, f"nothing went wrong: {events}"
    return refused[0].reason.partition("\n")[2]
