from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from microvm.errors import ConfigError
from microvm.images import cache, erofs, images, userland

from . import builders

needs_mkfs = pytest.mark.skipif(not shutil.which("mkfs.erofs"), reason="mkfs.erofs is not installed")


def add(entry: str, name: str, created: str = "2024") -> None:
    def make(out: Path) -> dict[str, Any]:
        (out / "root.erofs").write_bytes(bytes(1024) + erofs.MAGIC.to_bytes(4, "little"))
        return {"name": name, "created": created}

    cache.obtain("images", entry, make)


def test_a_missing_image_names_the_command() -> None:
    with pytest.raises(ConfigError, match="microvm image build python"):
        images.resolve(None)
    with pytest.raises(ConfigError, match="microvm image build base"):
        images.resolve("base")
    with pytest.raises(ConfigError, match="no such image or file"):
        images.resolve("mine")
    with pytest.raises(ConfigError, match="one of base, python"):
        images.build("mine")


def test_the_current_recipe_goes_before_a_newer_image() -> None:
    add("python-old", "python", "2025")
    assert images.resolve("python").path.parent.name == "python-old"
    current = images._current_entry("python")
    add(current, "python", "2024")
    assert images.resolve("").path.parent.name == current
    images.remove("python")
    assert images.list() == ()
    with pytest.raises(ConfigError):
        images.remove("python")


def test_files_resolve_only_when_they_are_erofs(tmp_path: Path) -> None:
    image = tmp_path / "x.erofs"
    image.write_bytes(b"junk")
    with pytest.raises(ConfigError, match="not an erofs image"):
        images.resolve(image)
    image.write_bytes(bytes(1024) + erofs.MAGIC.to_bytes(4, "little"))
    assert images.resolve(image).path == image
    with pytest.raises(ConfigError, match="not a file"):
        images.resolve(tmp_path)


def test_recipes_have_different_keys() -> None:
    assert images._current_entry("base") != images._current_entry("python")


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def member(name: str, uid: int = 0, kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.uid = info.gid = uid
    info.type = kind
    info.mode = mode
    return info


@needs_mkfs
def test_an_archive_becomes_an_image_that_keeps_owners(tmp_path: Path) -> None:
    archive = tmp_path / "mine.tar.gz"
    write_tar(
        archive,
        [
            (member("home/alice", 1000, tarfile.DIRTYPE, 0o700), b""),
            (member("home/alice/file", 1000), b"hello"),
            (member("home/bob", 70_000, tarfile.DIRTYPE, 0o755), b""),
            (member("etc/passwd"), b"root"),
            (member("dev/null", 0, tarfile.CHRTYPE), b""),
        ],
    )
    image = images.build_from(archive)
    assert image.name == "mine"
    assert images.resolve("mine") == image
    with open(image.path, "rb") as file:
        reader = erofs.Reader(file)
        assert reader.owner("home/alice") == (1000, 1000)
        assert reader.mode("home/alice") == 0o40700
        assert reader.owner("home/alice/file") == (1000, 1000)
        assert reader.owner("home/bob") == (70_000, 70_000)
        assert reader.owner("etc/passwd") == (0, 0)
        assert reader.mode("proc") & 0o170000 == 0o040000
        with pytest.raises(ConfigError, match="not in the image"):
            reader.inode("dev/null")


@needs_mkfs
def test_a_climbing_archive_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    archive = tmp_path / "bad.tar.gz"
    write_tar(archive, [(member("../../../escaped"), b"x")])
    with pytest.raises(ConfigError, match="climbs"):
        images.build_from(archive)
    assert not list(tmp_path.rglob("escaped"))


@needs_mkfs
def test_a_link_out_of_the_tree_does_not_lead_files_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = member("door", kind=tarfile.SYMTYPE)
    link.linkname = str(outside)
    archive = tmp_path / "bad.tar.gz"
    write_tar(archive, [(link, b""), (member("door/file"), b"x")])
    try:
        images.build_from(archive)
    except OSError:
        pass
    assert list(outside.iterdir()) == []


def test_what_is_no_archive_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "need_tools", lambda *_: None)
    junk = tmp_path / "junk.tar"
    junk.write_bytes(b"junk" * 1000)
    with pytest.raises(ConfigError, match="not a readable tar archive"):
        images.build_from(junk)
    with pytest.raises(ConfigError, match="no such file"):
        images.build_from(tmp_path / "missing.tar")
    with pytest.raises(ConfigError, match="taken"):
        images.build_from(junk, "python")


@needs_mkfs
def test_a_small_image_made_here_still_mounts(tmp_path: Path) -> None:
    # Changing an owner in the first block under a super block checksum made the kernel refuse the image (EBADMSG).
    tree = tmp_path / "tree"
    (tree / "home/user").mkdir(parents=True)
    image = tmp_path / "root.erofs"
    erofs.make(tree, image, {"home/user": (1000, 1000)}, times=0, compress=True)
    data = image.read_bytes()
    assert not data[erofs.SUPER_OFFSET + 8] & 1, "the checksum feature is on"
    assert erofs.is_erofs(image)


@pytest.mark.parametrize("data", [b"", bytes(4096), b"\xe2\xe1\xf5\xe0" * 1024])
def test_a_damaged_image_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        erofs.Reader(io.BytesIO(data)).inode("etc/passwd")


def test_the_common_files_are_there(tmp_path: Path) -> None:
    userland.merge_usr(tmp_path)
    userland.add_common(tmp_path)
    assert "user:x:1000:1000" in (tmp_path / "etc/passwd").read_text()
    assert (tmp_path / "tmp").stat().st_mode & 0o7777 == 0o1777
    assert (tmp_path / "etc/resolv.conf").exists()
    assert (tmp_path / "bin").readlink() == Path("usr/bin")


def test_merging_usr_keeps_what_both_have(tmp_path: Path) -> None:
    for path in ("bin/sh", "usr/bin/python3", "lib/a/x", "usr/lib/a/y"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    userland.merge_usr(tmp_path)
    assert (tmp_path / "usr/bin/sh").read_text() == "bin/sh"
    assert sorted(path.name for path in (tmp_path / "lib/a").iterdir()) == ["x", "y"]


def test_static_programs_are_told_from_dynamic_ones() -> None:
    static = builders.elf()
    dynamic = bytearray(static)
    dynamic[64:68] = b"\3\0\0\0"
    assert userland.is_static_elf(static)
    assert not userland.is_static_elf(bytes(dynamic))
    assert not userland.is_static_elf(b"#!/bin/sh\n")
