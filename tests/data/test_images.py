"""Folders of images: layouts, modes, and everything that can be wrong with a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from weightfold.data import load
from weightfold.errors import ConfigError, DataError

PIL = pytest.importorskip("PIL.Image", exc_type=ImportError)
Encode = Callable[..., bytes]


def test_a_folder_is_divided_class_by_class(image_folder: Path) -> None:
    data = load(image_folder)
    assert data.name == "pets"
    assert data.classes == ("ant", "bee", "cat")
    assert (len(data.train), len(data.val), len(data.test)) == (21, 3, 6)
    assert data.train.inputs.dtype == torch.uint8
    assert data.train.inputs.shape[1:] == data.task.input.shape == (1, 8, 8)


def test_pixels_and_labels_stay_together(image_folder: Path) -> None:
    data = load(image_folder)
    known = {np.asarray(PIL.open(path)).tobytes(): path.parent.name for path in sorted(image_folder.glob("*/*.png"))}
    for split in (data.train, data.val, data.test):
        for pixels, label in zip(split.inputs, split.targets.tolist(), strict=True):
            assert known.pop(pixels.numpy().tobytes()) == data.classes[label]
    assert not known


def test_train_and_test_folders_are_kept(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "divided"
    shutil.copytree(image_folder, root / "train")
    shutil.copytree(image_folder / "bee", root / "test" / "bee")
    data = load(root)
    assert data.test.targets.tolist() == [1] * 10
    assert len(data.train) + len(data.val) == 30


def test_the_seed_decides_and_the_random_state_stays(image_folder: Path) -> None:
    before = torch.get_rng_state()
    one, two, other = (load(image_folder, seed=seed).fingerprint for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


def test_other_files_are_passed_over(image_folder: Path) -> None:
    before = load(image_folder).fingerprint
    (image_folder / "notes.md").write_text("hello")
    (image_folder / "ant" / "Thumbs.db").write_bytes(b"x")
    (image_folder / ".git").mkdir()
    assert load(image_folder).fingerprint == before


def test_progress_counts_to_the_end(image_folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    load(image_folder, limit=12, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (12, 12)


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_modes_give_one_channel(image_folder: Path, encode_image: Encode, mode: str) -> None:
    for i, path in enumerate(sorted(image_folder.glob("*/*.png"))):
        path.write_bytes(encode_image(i, mode=mode))
    assert load(image_folder).task.input.shape == (1, 8, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_one_colour_image_makes_all_of_them_colour(image_folder: Path, encode_image: Encode, mode: str) -> None:
    (image_folder / "bee" / "3.png").write_bytes(encode_image(7, mode=mode))
    data = load(image_folder)
    assert data.task.input.shape == (3, 8, 8)
    grey = sum(bool((image == image[:1]).all()) for s in (data.train, data.val, data.test) for image in s.inputs)
    assert grey == 29


def test_mixed_sizes_name_two_files_and_can_be_resized(image_folder: Path, encode_image: Encode) -> None:
    (image_folder / "cat" / "3.png").write_bytes(encode_image(7, side=9))
    with pytest.raises(DataError, match=r"'.*\.png' has 8×8 pixels, '.*3\.png' has 9×9.*\n.*size=8") as caught:
        load(image_folder, limit=30)
    assert caught.value.message.count(".png") == 2
    assert load(image_folder, size=6).task.input.shape == (1, 6, 6)


def break_text(path: Path) -> None:
    path.write_text("no image at all")


def break_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def break_deep(path: Path) -> None:
    PIL.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(path)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(break_text, "no known format"), (break_truncated, "cannot be read"), (break_deep, "more than 8 bits a channel")],
)
def test_a_damaged_image_is_named(image_folder: Path, damage: Callable[[Path], None], complaint: str) -> None:
    damage(image_folder / "bee" / "4.png")
    with pytest.raises(DataError, match=complaint) as caught:
        load(image_folder)
    assert "4.png" in caught.value.message
    assert "0x" not in caught.value.message
    assert caught.value.remedy


def test_an_empty_class_is_named(image_folder: Path) -> None:
    (image_folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"'.*dog' holds no image"):
        load(image_folder)


def test_a_single_class_is_refused(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "bee")
    shutil.rmtree(image_folder / "cat")
    with pytest.raises(DataError, match="one class only: 'ant'"):
        load(image_folder)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no sub-folders.\n.*one sub-folder per class"):
        load(tmp_path)


def test_a_class_of_the_test_folder_alone_is_refused(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "divided"
    shutil.copytree(image_folder, root / "train")
    shutil.copytree(image_folder / "bee", root / "test" / "dog")
    with pytest.raises(DataError, match=r"'.*dog' is a class of the test set.*\n.*ant, bee, cat"):
        load(root)


def test_a_limit_too_small_for_the_splits_names_a_class(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"Class 'ant' of 'pets' has 2 .*\n.*raise 'limit'"):
        load(image_folder, limit=6)


def test_missing_sources_and_unknown_settings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set 'digit'.*\n.*Did you mean 'digits'"):
        load("digit")
    (tmp_path / "x.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"ending '.xlsx'; known are .parquet"):
        load(tmp_path / "x.xlsx")
    with pytest.raises(ConfigError, match=r"no setting 'targt'.*\n.*Did you mean 'target'"):
        load("digits", targt=1)
    with pytest.raises(ConfigError, match="'download' setting"):
        load("digits", download="always")
    with pytest.raises(ConfigError, match="'limit' setting"):
        load("digits", limit=0)


def test_a_missing_dependency_says_the_line_to_install_it(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"'PIL', which is not installed.*\n.*pip install \"weightfold\[data\]\""):
        load(image_folder)
    with pytest.raises(DataError, match="'sklearn', which is not installed"):
        load("digits")


def test_digits_are_those_of_scikit_learn() -> None:
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    data = load("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1295, 143, 359)
    known = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(y))
        for image, y in zip(bunch.images, bunch.target, strict=True)
    )
    splits = (data.train, data.val, data.test)
    found = sorted(
        (image.numpy().tobytes(), label)
        for split in splits
        for image, label in zip(split.inputs, split.targets.tolist(), strict=True)
    )
    assert found == known
