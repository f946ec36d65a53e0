from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm.errors import ConfigError
from microvm.images import cpio
from microvm.images.initrd import agent_initrd


def parse(archive: bytes) -> dict[str, dict[str, object]]:
    """Read an archive back; concatenated ones too."""
    names = [
        "ino",
        "mode",
        "uid",
        "gid",
        "nlink",
        "mtime",
        "size",
        "devmajor",
        "devminor",
        "rmajor",
        "rminor",
        "namesize",
        "check",
    ]
    found: dict[str, dict[str, object]] = {}
    at = 0
    while at < len(archive):
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        head = dict(zip(names, (int(archive[at + 6 + i * 8 : at + 14 + i * 8], 16) for i in range(13)), strict=True))
        name = archive[at + 110 : at + 110 + head["namesize"] - 1].decode()
        at = (at + 110 + head["namesize"] + 3) & ~3
        data = archive[at : at + head["size"]]
        at = (at + head["size"] + 3) & ~3
        if name != "TRAILER!!!":
            found[name] = {**head, "data": data}
    return found


def test_entries_read_back() -> None:
    files = parse(
        cpio.pack(
            [
                cpio.directory("dev"),
                cpio.character_device("dev/console", 5, 1),
                cpio.file("init", b"program", 0o755, mtime=1234),
                cpio.symlink("sbin", "bin"),
            ]
        )
    )
    assert list(files) == ["dev", "dev/console", "init", "sbin"]
    assert (files["dev/console"]["rmajor"], files["dev/console"]["rminor"]) == (5, 1)
    assert files["init"]["data"] == b"program"
    assert files["init"]["mtime"] == 1234
    assert files["init"]["mode"] == 0o100755
    assert files["sbin"]["data"] == b"bin"
    assert files["sbin"]["mode"] == 0o120777


def test_missing_parents_are_put_in_first() -> None:
    assert list(parse(cpio.pack([cpio.file("a/b/c", b"x")]))) == ["a", "a/b", "a/b/c"]


def test_an_archive_has_a_length_that_allows_another_behind_it() -> None:
    one, two = cpio.pack([cpio.file("a", b"1")]), cpio.pack([cpio.file("b", b"22")])
    assert len(one) % 4 == 0
    assert list(parse(one + two)) == ["a", "b"]


@pytest.mark.parametrize("path", ["", "/etc", "../x", "a/../b", "a//b", "./a", "a\0b"])
def test_paths_that_climb_or_are_absolute_are_refused(path: str) -> None:
    with pytest.raises(ConfigError):
        cpio.pack([cpio.file(path, b"")])


def test_a_path_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        cpio.pack([cpio.file("a", b""), cpio.file("a", b"")])


def test_a_tree_keeps_times_and_modes_and_order(tmp_path: Path) -> None:
    for name in ("b.py", "a.py"):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).chmod(0o640)
        os.utime(tmp_path / name, (77, 77))
    (tmp_path / "link").symlink_to("a.py")
    files = parse(cpio.pack(cpio.tree(tmp_path)))
    assert list(files) == ["a.py", "b.py", "link"]
    assert files["a.py"]["mtime"] == 77
    assert files["a.py"]["mode"] == 0o100640
    assert files["a.py"]["uid"] == 0
    assert cpio.pack(cpio.tree(tmp_path)) == cpio.pack(cpio.tree(tmp_path))


def test_the_agents_initramfs_starts_it(tmp_path: Path) -> None:
    (tmp_path / "agent").write_bytes(b"ELF")
    files = parse(agent_initrd(tmp_path / "agent"))
    assert files["init"]["data"] == b"ELF"
    assert files["init"]["mode"] == 0o100755
    assert {"dev", "proc", "sys", "dev/console", "dev/null"} <= files.keys()
