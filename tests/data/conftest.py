"""Where the real data lies, and small data made on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Give the path of a file of real data; skip the test where it is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data is not here: ../shared/data/{name}")
        return path

    return find


@pytest.fixture
def encode_image() -> Callable[..., bytes]:
    """Give a function that encodes an image of noise, of one seed, size, mode and format."""
    image = pytest.importorskip("PIL.Image", exc_type=ImportError)

    def encode(seed: int, *, side: int = 8, mode: str = "L", format: str = "PNG") -> bytes:
        noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        image.fromarray(noise).convert(mode).save(buffer, format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def image_folder(tmp_path: Path, encode_image: Callable[..., bytes]) -> Path:
    """Make a folder of three classes with ten grey images each."""
    for label, name in enumerate(("ant", "bee", "cat")):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for i in range(10):
            (folder / f"{i}.png").write_bytes(encode_image(100 * label + i))
    return tmp_path / "pets"
