"""Reading option values."""

from __future__ import annotations

import pytest

from microvm.cli.boot import EscapeFilter
from microvm.cli.options import cpu_count, environment, memory_mib, seconds
from microvm.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "mib"), [("64", 64), ("512M", 512), ("512m", 512), ("2G", 2048), ("1 gib", 1024), ("128MiB", 128)]
)
def test_sizes_are_read_with_and_without_unit(text: str, mib: int) -> None:
    assert memory_mib(text) == mib


@pytest.mark.parametrize("text", ["", "x", "1.5G", "64K", "0", "-64", "65", "9" * 40, "1e3", "999999G"])
def test_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="memory"):
        memory_mib(text)


@pytest.mark.parametrize("text", ["0", "33", "-1", "two", ""])
def test_impossible_cpu_counts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cpus"):
        cpu_count(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon", ""])
def test_impossible_timeouts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="timeout"):
        seconds("timeout", text)


def test_durations_are_read() -> None:
    assert seconds("timeout", "1.5") == 1.5
    assert seconds("timeout", "10s") == 10
    assert seconds("timeout", None) is None


def test_environment_takes_values_and_passes_own_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "mine")
    monkeypatch.delenv("MISSING", raising=False)
    assert environment(["A=1", "B=", "C=x=y", "OWN", "MISSING"]) == {"A": "1", "B": "", "C": "x=y", "OWN": "mine"}


def test_environment_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        environment(["=x"])


@pytest.mark.parametrize(
    ("typed", "passed", "quits"),
    [
        ([b"ls\n"], b"ls\n", 0),
        ([b"\x01x"], b"", 1),
        ([b"\x01", b"X"], b"", 1),
        ([b"a\x01\x01b"], b"a\x01b", 0),
        ([b"\x01qz"], b"z", 0),
    ],
)
def test_escape_key_quits_and_doubled_is_itself(typed: list[bytes], passed: bytes, quits: int) -> None:
    seen: list[bytes] = []
    quit_calls: list[None] = []
    keys = EscapeFilter(seen.append, lambda: quit_calls.append(None))
    for piece in typed:
        keys.feed(piece)
    assert b"".join(seen) == passed
    assert len(quit_calls) == quits
