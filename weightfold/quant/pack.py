"""Small whole numbers as bits in a file, packed end to end or entropy-coded. NumPy and the standard library."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from weightfold.errors import ArtifactError, ConfigError

Bytes = npt.NDArray[np.uint8]


def bits_for(n: int) -> int:
    """Bits that tell n things apart; 0 for one.

    Example:
        >>> [bits_for(n) for n in (1, 2, 3, 16, 17)]
        [0, 1, 2, 4, 5]
    """
    return max(n - 1, 0).bit_length()


def pack(numbers_N: npt.NDArray[np.integer], bits: int) -> Bytes:
    """Write numbers end to end, the lowest bit first; the last byte is filled with zeros.

    Args:
        numbers_N: 0 to 2**bits - 1.
        bits: of each, 0 to 16.
    Returns:
        data: ceil(N bits / 8) bytes.
    Raises:
        ConfigError: a number needs more bits.
    Example:
        >>> pack(np.array([1, 0, 1, 1]), 1), len(pack(np.arange(5), 3))
        (array([13], dtype=uint8), 2)
    """
    numbers = np.asarray(numbers_N, np.int64).reshape(-1)
    if not 0 <= bits <= 16 or (numbers.size and (numbers.min() < 0 or numbers.max() >> bits)):
        raise ConfigError(f"Numbers up to {numbers.max(initial=0)} do not fit into {bits} bits each.")
    spread = (numbers[:, None] >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little")


def unpack(data: Bytes, bits: int, n: int) -> npt.NDArray[np.int64]:
    """Read back n numbers that `pack` wrote.

    Raises:
        ArtifactError: there are fewer or more bytes than these take.
    Example:
        >>> unpack(pack(np.array([5, 0, 7]), 3), 3, 3)
        array([5, 0, 7])
    """
    expected = (n * bits + 7) // 8
    if len(data) != expected:
        raise ArtifactError(f"{n} numbers of {bits} bits take {expected} bytes; there are {len(data)}.")
    if bits == 0:
        return np.zeros(n, np.int64)
    spread = np.unpackbits(data, count=n * bits, bitorder="little").reshape(n, bits)
    return spread.astype(np.int64) @ (1 << np.arange(bits))


def deflate(numbers_N: npt.NDArray[np.integer], bits: int) -> Bytes:
    """Entropy-code numbers with zlib: the shortest of matches, Huffman codes alone, and packed bits.

    Example:
        >>> numbers = np.array([0] * 500 + [3] * 12)
        >>> len(deflate(numbers, 2)) < len(pack(numbers, 2))
        True
        >>> bool((inflate(deflate(numbers, 2), 2, 512) == numbers).all())
        True
    """
    wide = np.asarray(numbers_N, np.uint8 if bits <= 8 else np.dtype("<u2")).tobytes()
    tried = [bytes([0]) + pack(numbers_N, bits).tobytes()]
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY):
        coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy)
        tried.append(bytes([1]) + coder.compress(wide) + coder.flush())
    return np.frombuffer(min(tried, key=len), np.uint8)


def inflate(data: Bytes, bits: int, n: int) -> npt.NDArray[np.int64]:
    """Read back n numbers that `deflate` wrote.

    Raises:
        ArtifactError: the bytes are corrupt, or hold another count of numbers.
    """
    raw = np.asarray(data, np.uint8)
    if len(raw) == 0 or raw[0] > 1:
        raise ArtifactError("Coded numbers start with a byte that names no coding.")
    if raw[0] == 0:
        return unpack(raw[1:], bits, n)
    kind = np.dtype(np.uint8 if bits <= 8 else "<u2")
    try:
        wide = zlib.decompressobj(-15).decompress(raw[1:].tobytes(), n * kind.itemsize + 1)
    except zlib.error as error:
        raise ArtifactError(f"Coded numbers are corrupt: {error}") from None
    if len(wide) != n * kind.itemsize:
        raise ArtifactError(f"{n} coded numbers were expected; there are more or fewer.")
    numbers = np.frombuffer(wide, kind)
    return numbers.astype(np.int64)
