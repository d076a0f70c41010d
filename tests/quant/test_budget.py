"""Targets and the controllers that meet them, on toy networks whose answer to a price is known."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.errors import ConfigError
from weightfold.quant.budget import Budget, Caution, Ramp, target_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("48 kB", 48_000), ("48KiB", 49_152), (".5 MB", 500_000), ("1.5%", 15_000), (" 7000 ", 7000), ("1e3 B", 1000)],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert target_bytes(text, 10**6) == expected


@pytest.mark.parametrize("text", ["", "small", "-3 kB", "0", "0%", "12 stones", "nan", "1e999", "3 kB 4", "٣ x"])
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        target_bytes(text, 10**6)
    assert repr(text)[1:-1] in caught.value.message
    assert "48 kB" in caught.value.remedy


def controlled(budget: Budget, power: float, lag: float, steps: int = 400) -> float:
    """A network whose file goes to first · (λ/2e-7)^-power after a while; the last size."""
    size = first = 1e5
    for k in range(1, steps + 1):
        share = k / steps
        if share < budget.start:
            continue
        wanted = min(first, first * (budget.price / 2e-7) ** -power)
        rate = lag if wanted < size else lag / 10
        size = math.exp(math.log(size) + rate * (math.log(wanted) - math.log(size)))
        budget.update(share, size)
    return size


@pytest.mark.parametrize("power", [0.4, 0.8, 1.2])
@pytest.mark.parametrize("lag", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("target", [2e3, 2e4])
def test_a_budget_is_met(power: float, lag: float, target: float) -> None:
    assert controlled(Budget(target, 0.1, 0.5), power, lag) == pytest.approx(target, rel=0.25)


def test_a_budget_wants_a_geometric_fall_between_start_and_reach() -> None:
    budget = Budget(1e3, 0.1, 0.5)
    budget.update(0.1, 1e5)
    assert [budget.wanted(share) for share in (0.0, 0.1, 0.3, 0.5, 1.0)] == pytest.approx([1e5, 1e5, 1e4, 1e3, 1e3])
    generous = Budget(1e6, 0.1, 0.5)
    for k in range(100):
        generous.update(0.1 + 0.009 * k, 1e5)
    assert generous.price < 1e-9, "a file that is small enough is not pressed"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(1, 1e9), min_size=2, max_size=30))
def test_prices_stay_within_bounds_and_survive_a_restart(sizes: list[float]) -> None:
    budget, twin = Budget(500, 0.1, 0.5), Budget(500, 0.1, 0.5)
    for k, size in enumerate(sizes):
        share = 0.1 + 0.9 * k / len(sizes)
        budget.update(share, size)
        twin.load_state(json.loads(json.dumps(twin.to_state())))
        twin.update(share, size)
        assert 1e-10 * (1 - 1e-9) <= budget.price <= 1
        assert twin.price == budget.price


def test_a_ramp_grows_to_its_strength_before_reach() -> None:
    ramp = Ramp(1e-6, 0.2, 0.5)
    seen = []
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 1.0):
        ramp.update(share)
        seen.append(ramp.price)
    assert seen == pytest.approx([0, 0, 5e-7, 1e-6, 1e-6, 1e-6])


def test_caution_presses_until_half_of_the_room_is_used_and_lets_go_beyond_it() -> None:
    caution = Caution(1.0)
    prices = []
    for accuracy in (90.0, 91.0, 90.6, 90.3, 89.9, math.nan):
        caution.update(accuracy)
        prices.append(caution.price)
    assert prices[0] < prices[1] < prices[2] == prices[3] > prices[4] == prices[5]
    assert caution.best == 91.0
    twin = Caution(1.0)
    twin.load_state(json.loads(json.dumps(caution.to_state())))
    assert twin.price == caution.price
