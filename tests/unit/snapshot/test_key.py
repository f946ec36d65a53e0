"""The key beside the user's configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm.errors import HostError
from microvm.snapshot import key


def test_key_is_made_once_and_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_CONFIG", str(tmp_path / "config"))
    first = key.load()
    assert len(first) == 32
    assert key.load() == first
    path = tmp_path / "config" / "snapshot.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["snapshot.key"]


def test_damaged_key_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_CONFIG", str(tmp_path))
    (tmp_path / "snapshot.key").write_bytes(b"short")
    with pytest.raises(HostError, match="damaged"):
        key.load()
    assert (tmp_path / "snapshot.key").read_bytes() == b"short"
