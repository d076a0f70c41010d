"""Configurations: frozen values, JSON both ways, and refusals that say which setting is wrong."""

from __future__ import annotations

import json
import pickle
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from weightfold.config import Config, nearest
from weightfold.errors import ConfigError


class Gate(Config):
    tolerance: float = Field(0.1, ge=0)


class Settings(Config):
    share: float = Field(0.5, gt=0, le=1)
    widths: tuple[int, ...] = ()
    rule: Literal["magnitude", "random"] = "magnitude"
    note: str | None = None
    gate: Gate = Gate()


@given(
    share=st.floats(0, 1, exclude_min=True),
    widths=st.lists(st.integers(-(2**53), 2**53), max_size=4).map(tuple),
    rule=st.sampled_from(["magnitude", "random"]),
    note=st.none() | st.text(),
    tolerance=st.floats(0, allow_infinity=False),
)
def test_json_round_trip(share: float, widths: tuple[int, ...], rule: str, note: str | None, tolerance: float) -> None:
    config = Settings(share=share, widths=widths, rule=rule, note=note, gate=Gate(tolerance=tolerance))
    text = config.to_json()
    again = Settings.from_json(text)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert json.loads(text)["share"] == share


def test_a_config_is_immutable_and_survives_pickling() -> None:
    config = Settings(share=0.25)
    with pytest.raises(ValidationError, match="frozen"):
        config.share = 0.75  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_defaults_are_not_shared_state() -> None:
    assert Settings() == Settings()
    assert Settings(gate=Gate(tolerance=0.2)) != Settings()
    assert Settings().gate == Gate()


@pytest.mark.parametrize(
    "build",
    [lambda: Settings(shares=0.5), lambda: Settings.from_json('{"shares": 0.5}')],
    ids=["keyword", "json"],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(build) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert "Settings has no setting 'shares'" in str(caught.value)
    assert "Did you mean 'share'?" in str(caught.value)


@pytest.mark.parametrize(
    "build",
    [lambda: Settings(share=1.5), lambda: Settings.from_json('{"share": 1.5}')],
    ids=["keyword", "json"],
)
def test_a_value_out_of_range_is_named_with_its_bound(build) -> None:
    with pytest.raises(ConfigError, match=r"'share' setting of Settings .* less than or equal to 1.* Got 1\.5"):
        build()


def test_an_unknown_choice_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="'magnitude' or 'random'"):
        Settings(rule="magnitud")


def test_a_nested_mistake_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="toleranze"):
        Settings.from_json('{"gate": {"toleranze": 0.1}}')
    with pytest.raises(ConfigError, match="tolerance"):
        Settings(gate={"tolerance": -1})


def test_settings_that_do_not_go_together_are_told_in_a_sentence_of_their_own() -> None:
    class Pair(Config):
        low: int = 0
        high: int = 1

        @model_validator(mode="after")
        def _in_order(self) -> Pair:
            if self.low > self.high:
                raise ValueError("'low' is above 'high'")
            return self

    with pytest.raises(ConfigError, match=r"^Settings of Pair do not go together: 'low' is above 'high'\.$"):
        Pair(low=2)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_text_that_is_no_object_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        Settings.from_json(text)


def test_nearest_names_a_close_word_or_only_the_valid_ones() -> None:
    assert nearest("foldd", ["lump", "fold"]) == "Did you mean 'fold'? Valid: fold, lump."
    assert nearest("zzz", ["lump", "fold"]) == "Valid: fold, lump."
