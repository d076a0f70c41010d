"""Example inputs: text, data, tensors."""

from __future__ import annotations

import pytest
import torch

from weightfold.artifact import Input
from weightfold.errors import ArtifactError, ConfigError
from weightfold.export.example import draw, parse_input, zeros
from weightfold.export.opened import open_model


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1x3x32x32", Input(shape=(1, 3, 32, 32))),
        ("4", Input(shape=(4,))),
        (" 2,16:int ", Input(shape=(2, 16), dtype="int64")),
        ("mask=1x8:bool", Input(shape=(1, 8), dtype="bool", name="mask")),
        ("ids=1x8:int32<50", Input(shape=(1, 8), dtype="int32", name="ids", high=50)),
    ],
)
def test_text_is_read(text: str, wanted: Input) -> None:
    assert parse_input(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "3x", "1x-3", "3 4", "1x3:flot", "0x3", "a=b=1", "1.5x2"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_input(text)


def test_tensors_are_made_in_the_form_that_trace_takes() -> None:
    assert zeros([Input(shape=(1, 2))]).shape == (1, 2)
    assert len(zeros([Input(shape=(1,)), Input(shape=(2,))])) == 2
    assert zeros([Input(shape=(1, 2), name="x")])["x"].shape == (1, 2)
    args, named = zeros([Input(shape=(1,)), Input(shape=(2,), name="x")])
    assert (len(args), set(named)) == (1, {"x"})


def test_drawn_numbers_follow_the_seed_and_stay_below_the_bound() -> None:
    inputs = [Input(shape=(2, 50)), Input(shape=(2, 50), dtype="int64", high=7, name="ids")]
    (x,), named = draw(inputs, seed=3, batch=5)
    again, _ = draw(inputs, seed=3, batch=5)
    assert x.shape == (5, 50)
    assert torch.equal(x, again[0])
    assert 0 <= named["ids"].min() <= named["ids"].max() < 7


@pytest.mark.parametrize(
    ("name", "example", "shape"),
    [
        ("lenet5", [], (2, 1, 8, 8)),
        ("mlp", ["1x16"], (1, 16)),
        ("char-gpt", ["1x9:int<30"], (1, 9)),
        ("gru", [], (2, 128)),
    ],
)
def test_built_in_networks_open_without_data(name: str, example: list[str], shape: tuple[int, ...]) -> None:
    source = open_model(name, example=example)
    assert source.inputs[0].shape == shape
    args, _ = draw(source.inputs)
    with torch.no_grad():
        source.model(*args)


def test_a_folder_without_a_model_is_refused(tmp_path: object) -> None:
    with pytest.raises(ArtifactError, match="neither a run"):
        open_model(str(tmp_path))
    with pytest.raises(ConfigError, match="4 dimensions"):
        open_model("mlp", example=["1x2x3"])
