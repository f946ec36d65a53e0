"""Snapshot files: what is written comes back, what was touched is refused, and a crash leaves the old or the new."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from microvm.errors import HostError, SnapshotError
from microvm.snapshot import format
from microvm.snapshot.format import HEADER, Parent, Snapshot, write

PAGE = 4096
SECRET = b"s" * 32
SIZE = 64 * PAGE


def memory(*pages: int, fill: int = 1) -> bytearray:
    data = bytearray(SIZE)
    for page in pages:
        data[page * PAGE : (page + 1) * PAGE] = bytes([fill + page]) * PAGE
    return data


def save(path: Path, data: bytearray, pages: list[tuple[int, int]] | None = None, **options: Any) -> str:
    return write(path, {"a": 1}, memoryview(data), pages or [(0, 64)], secret=SECRET, **options)


def load(path: Path, **options: Any) -> bytes:
    with Snapshot.open(path, secret=SECRET, **options) as snapshot:
        mapping = snapshot.map()
    with mapping:
        return bytes(mapping)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    data = memory(0, 7, 8, 63)
    identity = save(tmp_path / "s", data)
    with Snapshot.open(tmp_path / "s", secret=SECRET) as snapshot:
        assert snapshot.id == identity
        assert snapshot.description["a"] == 1
        assert snapshot.own == [(0, 1), (7, 2), (63, 1)]
    assert load(tmp_path / "s") == data


def test_zero_pages_take_no_room(tmp_path: Path) -> None:
    data = bytearray(64 << 20)
    data[5 * PAGE] = 1
    write(tmp_path / "s", {}, memoryview(data), [(0, len(data) // PAGE)], secret=SECRET)
    assert os.stat(tmp_path / "s").st_blocks * 512 < 1 << 20


def test_mapping_is_private(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(3))
    with Snapshot.open(tmp_path / "s", secret=SECRET) as snapshot, snapshot.map() as mapping:
        mapping[3 * PAGE] = 99
    assert load(tmp_path / "s") == memory(3)


def test_difference_takes_pages_from_itself_first(tmp_path: Path) -> None:
    identity = save(tmp_path / "base", memory(*range(40)))
    data = memory(*range(40))
    data[2 * PAGE : 3 * PAGE] = b"\xee" * PAGE
    data[5 * PAGE : 6 * PAGE] = bytes(PAGE)  # zeroed since
    data[10 * PAGE : 30 * PAGE] = b"\xdd" * (20 * PAGE)  # enough to be mapped
    changed = [(2, 1), (5, 1), (10, 20)]
    second = save(tmp_path / "d1", data, changed, parent=Parent(identity, tmp_path / "base"))
    assert load(tmp_path / "d1") == data
    data[0:PAGE] = b"\xcc" * PAGE
    save(tmp_path / "d2", data, [(0, 1)], parent=Parent(second, tmp_path / "d1"))
    assert load(tmp_path / "d2") == data
    with Snapshot.open(tmp_path / "d2", secret=SECRET) as snapshot:
        assert snapshot.own == [(0, 1)]
        assert snapshot.pages == [(0, 40)]


def test_difference_moves_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    identity = save(tmp_path / "one" / "base", memory(1))
    save(tmp_path / "one" / "d", memory(1, 2), [(2, 1)], parent=Parent(identity, tmp_path / "one" / "base"))
    (tmp_path / "one").rename(tmp_path / "two")
    assert load(tmp_path / "two" / "d") == memory(1, 2)


def test_difference_to_another_parent_is_refused(tmp_path: Path) -> None:
    identity = save(tmp_path / "base", memory(1))
    save(tmp_path / "d", memory(1, 2), [(2, 1)], parent=Parent(identity, tmp_path / "base"))
    save(tmp_path / "base", memory(9))
    with pytest.raises(SnapshotError, match="builds on another snapshot"):
        load(tmp_path / "d")
    (tmp_path / "base").unlink()
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        load(tmp_path / "d")


def test_chain_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "MAX_CHAIN", 3)
    identity = save(tmp_path / "0", memory(1))
    for number in range(1, 4):
        parent = Parent(identity, tmp_path / str(number - 1))
        identity = save(tmp_path / str(number), memory(1), [(1, 1)], parent=parent)
    load(tmp_path / "2")
    with pytest.raises(SnapshotError, match="more than 3"):
        load(tmp_path / "3")


def test_another_key_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(1))
    with pytest.raises(SnapshotError, match="not saved by this user"):
        Snapshot.open(tmp_path / "s", secret=b"t" * 32)


def test_newer_format_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(1))
    data = bytearray((tmp_path / "s").read_bytes())
    data[8:12] = (2).to_bytes(4, "little")
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(SnapshotError, match="newer version"):
        load(tmp_path / "s")


@pytest.mark.parametrize("content", [b"", b"x", b"#!/bin/sh\n" * 1000, bytes(8192)])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(SnapshotError, match="is not a snapshot"):
        load(tmp_path / "s")


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="there is no snapshot"):
        load(tmp_path / "s")
    with pytest.raises((SnapshotError, HostError)):
        load(tmp_path)


def test_truncated_file_is_refused_at_any_length(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(0, 63))
    data = (tmp_path / "s").read_bytes()
    for size in sorted({random.Random(1).randrange(len(data)) for _ in range(40)} | {HEADER.size, 4096, len(data) - 1}):
        (tmp_path / "s").write_bytes(data[:size])
        with pytest.raises(SnapshotError):
            load(tmp_path / "s")


def test_touched_memory_is_found_though_it_is_not_read_otherwise(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(0, 7))
    data = bytearray((tmp_path / "s").read_bytes())
    data[-57 * PAGE + 10] ^= 1
    with open(tmp_path / "s", "r+b") as file:
        file.write(data)
    with pytest.raises(SnapshotError, match=r"memory in .* is damaged"):
        load(tmp_path / "s")


def test_copy_of_a_snapshot_is_as_good(tmp_path: Path) -> None:
    save(tmp_path / "s", memory(0, 7))
    (tmp_path / "t").write_bytes((tmp_path / "s").read_bytes())  # with another modification time
    assert load(tmp_path / "t") == memory(0, 7)


class _Crash(BaseException):
    pass


def test_crash_at_any_step_leaves_the_old_snapshot_or_the_new(tmp_path: Path) -> None:
    old, new = memory(1), memory(2, 3)
    steps: list[str] = []
    save(tmp_path / "s", new, step=steps.append)
    assert steps[0] == "created"
    assert steps[-1] == "renamed"
    for stop in range(len(steps)):
        save(tmp_path / "s", old)
        left = iter(range(stop))

        def crash(step: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise _Crash(step)

        with pytest.raises(_Crash):
            save(tmp_path / "s", new, step=crash)
        assert load(tmp_path / "s") == (new if steps[stop] == "renamed" else old)
        assert os.listdir(tmp_path) == ["s"]


def test_process_killed_at_any_step_leaves_the_old_snapshot_or_the_new(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    old, new = memory(1), memory(2, 3)
    steps: list[str] = []
    save(tmp_path / "s", new, step=steps.append)
    for stop in range(len(steps)):
        save(tmp_path / "s", old)
        pid = os.fork()
        if pid == 0:
            left = iter(range(stop))

            def die(step: str, left: Any = left) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), 9)

            save(tmp_path / "s", new, step=die)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
        assert load(tmp_path / "s") == (new if steps[stop] == "renamed" else old)


def test_full_disk_leaves_the_old_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "s", memory(1))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(format, "_write_memory", full)
    with pytest.raises(HostError, match="no space left"):
        save(tmp_path / "s", memory(2))
    assert load(tmp_path / "s") == memory(1)
    assert os.listdir(tmp_path) == ["s"]
