from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm.disk import RawDisk, raw
from microvm.errors import ConfigError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 256)
    return path


def open_disk(path: Path, flags: int = os.O_RDWR) -> RawDisk:
    return RawDisk(os.open(path, flags | getattr(os, "O_BINARY", 0)), "disk.img")


def views_of(buffer: bytearray, *sizes: int) -> list[memoryview]:
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(buffer)[at : at + size])
        at += size
    return views


@pytest.mark.parametrize("size", [0, 1, 511, 513, 1000])
def test_a_size_that_is_not_whole_sectors_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(ConfigError, match=r"odd\.img .*512"):
        RawDisk(fd, "odd.img")
    os.close(fd)


def test_reads_fill_views_in_order(path: Path) -> None:
    disk = open_disk(path)
    buffer = bytearray(1024)
    disk.read(views_of(buffer, 1, 511, 512), 512)
    assert buffer == bytes(range(256)) * 4
    assert disk.sectors == 128
    disk.close()
    disk.close()


def test_writes_land_where_they_should_and_last(path: Path) -> None:
    disk = open_disk(path)
    disk.write(views_of(bytearray(b"ab" * 512), 3, 1021), 1024)
    disk.flush()
    disk.close()
    data = path.read_bytes()
    assert data[1024:2048] == b"ab" * 512
    assert len(data) == 65536
    assert data[:1024] == bytes(range(256)) * 4


def test_more_views_than_one_call_takes(path: Path) -> None:
    disk = open_disk(path)
    buffer = bytearray(4096)
    disk.read(views_of(buffer, *[2] * 2048), 0)
    assert buffer == bytes(range(256)) * 16
    disk.write(views_of(bytearray(b"z" * 4096), *[2] * 2048), 0)
    assert path.read_bytes()[:4097] == b"z" * 4096 + b"\0"
    disk.close()


def test_short_counts_are_carried_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = raw.read_at
    monkeypatch.setattr(raw, "read_at", lambda fd, views, offset: whole(fd, [views[0][:100]], offset))
    disk = open_disk(path)
    buffer = bytearray(1024)
    disk.read(views_of(buffer, 300, 724), 0)
    assert buffer == bytes(range(256)) * 4
    disk.close()


def test_an_image_that_shrank_is_an_io_error(path: Path) -> None:
    disk = open_disk(path)
    os.truncate(path, 512)
    with pytest.raises(OSError, match="shorter"):
        disk.read(views_of(bytearray(1024), 1024), 0)
    disk.close()


def test_writing_through_a_read_only_descriptor_is_an_io_error(path: Path) -> None:
    disk = open_disk(path, os.O_RDONLY)
    with pytest.raises(OSError):
        disk.write(views_of(bytearray(512), 512), 0)
    disk.close()


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("can_punch", [False, True])
def test_zeroes_are_written_with_and_without_holes(
    path: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, can_punch: bool
) -> None:
    if not can_punch:
        monkeypatch.setattr(raw, "punch_hole", lambda fd, offset, size: False)
    disk = open_disk(path)
    disk.write_zeroes(512, 40_000 // 512 * 512, unmap)
    data = path.read_bytes()
    end = 512 + 40_000 // 512 * 512
    assert data[:512] == bytes(range(256)) * 2
    assert data[512:end] == bytes(end - 512)
    assert data[end:] == (bytes(range(256)) * 256)[end:]
    disk.close()


def test_discard_frees_blocks_or_does_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = open_disk(path)
    before = os.stat(path).st_blocks if hasattr(os.stat(path), "st_blocks") else 0
    disk.discard(0, 65536)
    assert path.stat().st_size == 65536
    if disk._can_punch:
        assert os.stat(path).st_blocks < before
    calls = []
    monkeypatch.setattr(raw, "punch_hole", lambda fd, offset, size: calls.append(size))
    disk.discard(0, 512)
    disk.discard(0, 512)
    assert len(calls) <= 1  # a file system that cannot is asked once
    disk.close()
