"""Sets of pages as ascending, disjoint pairs of first page and number of pages."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Final

from ..errors import SnapshotError

Ranges = list[tuple[int, int]]
_WORD: Final = "I"
assert array(_WORD).itemsize == 4


def merge(*sets: Iterable[tuple[int, int]]) -> Ranges:
    """The union."""
    merged: Ranges = []
    for first, count in sorted(pair for one in sets for pair in one):
        if merged:
            start, length = merged[-1]
            if first <= start + length:
                merged[-1] = (start, max(length, first + count - start))
                continue
        merged.append((first, count))
    return merged


def total(ranges: Iterable[tuple[int, int]]) -> int:
    """How many pages there are."""
    return sum(count for _, count in ranges)


def pack(ranges: Ranges) -> bytes:
    """Two little-endian words of 32 bits a range."""
    words = array(_WORD, (word for pair in ranges for word in pair))
    return _little(words).tobytes()


def unpack(data: bytes, pages: int) -> Ranges:
    """What `pack` made, for a memory of so many pages. Raises SnapshotError for anything else."""
    words = array(_WORD)
    if len(data) % 8:
        raise SnapshotError("the snapshot's table of pages is damaged")
    words.frombytes(data)
    words = _little(words)
    ranges = list(zip(words[0::2], words[1::2], strict=True))
    end = 0
    for first, count in ranges:
        if first < end or count == 0 or first + count > pages:
            raise SnapshotError("the snapshot's table of pages is damaged")
        end = first + count
    return ranges


def _little(words: array[int]) -> array[int]:
    import sys

    if sys.byteorder == "big":
        words.byteswap()
    return words
