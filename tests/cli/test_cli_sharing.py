"""`weightfold sharing`."""

from __future__ import annotations

import json

from .conftest import Run


def test_sharing_lists_kinds_places_and_savings(cli: Run) -> None:
    done = cli("sharing", "lenet5", "--example", "1x1x28x28")
    assert done.exit_code == 0, done.output
    for word in ("space", "conv1", "saves", "do the work of"):
        assert word in done.stdout
    facts = json.loads(cli("sharing", "lenet5", "--example", "1x1x28x28", "--json").stdout)
    assert facts["saved"].keys() == {"space"}
    assert facts["applied"] > facts["parameters"]
    assert facts["parameters"] == facts["applied"] - facts["saved"]["space"]


def test_sharing_names_tied_tensors(cli: Run) -> None:
    facts = json.loads(cli("sharing", "char-gpt", "--json").stdout)
    assert [row["tensors"] for row in facts["rows"] if row["kind"] == "tied"] == [["token.weight"]]
    assert "the model's forward" in cli("sharing", "char-gpt").stdout


def test_a_network_without_sharing_says_so(cli: Run) -> None:
    assert "Nothing is shared" in cli("sharing", "mlp").stdout


def test_a_model_without_an_example_asks_for_one(cli: Run) -> None:
    done = cli("sharing", "torch.nn:Identity")
    assert done.exit_code == 2
    assert "--example" in done.output
