"""State as JSON: exactly what is declared comes back, anything else is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from microvm.errors import SnapshotError
from microvm.snapshot import codec, ranges


@dataclass(frozen=True, slots=True)
class Inner:
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    flag: bool
    maybe: int | None
    inners: tuple[Inner, ...]
    extra: dict[str, Any] = field(default_factory=dict)


OUTER = Outer("x", True, None, (Inner(1, b"\0\xff"), Inner(1 << 63, b"")), {"list": [1, [b"y", None]]})


def test_round_trip() -> None:
    assert codec.build(Outer, codec.decode(codec.encode(OUTER))) == OUTER


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", 1),
        ("flag", "yes"),
        ("maybe", "1"),
        ("inners", {}),
        ("inners", [{"number": 1}]),
        ("inners", [{"number": True, "data": b""}]),
        ("inners", [{"number": 1, "data": "text"}]),
        ("extra", []),
        ("unknown", 1),
    ],
)
def test_another_type_is_refused(name: str, value: object) -> None:
    decoded = codec.decode(codec.encode(OUTER))
    decoded[name] = value
    with pytest.raises(SnapshotError):
        codec.build(Outer, codec.decode(codec.encode(decoded)))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"$bytes":1}', b'{"$bytes":"*"}', b"[" * 100_000])
def test_what_is_not_ours_is_refused(data: bytes) -> None:
    with pytest.raises(SnapshotError):
        codec.decode(data)


def test_ranges_merge_and_pack() -> None:
    assert ranges.merge([(5, 2), (0, 1)], [(1, 1), (6, 10)]) == [(0, 2), (5, 11)]
    assert ranges.unpack(ranges.pack([(0, 2), (5, 11)]), 16) == [(0, 2), (5, 11)]
    assert ranges.total([(0, 2), (5, 11)]) == 13


@pytest.mark.parametrize("bad", [[(0, 0)], [(5, 1), (4, 1)], [(15, 2)], [(0, 2), (1, 1)]])
def test_impossible_ranges_are_refused(bad: list[tuple[int, int]]) -> None:
    with pytest.raises(SnapshotError):
        ranges.unpack(ranges.pack(bad), 16)
