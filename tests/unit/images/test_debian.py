from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from microvm.errors import ConfigError
from microvm.images import debian

from . import builders


def everything(path: str) -> bool:
    return True


def read(tmp_path: Path, data: bytes) -> dict[str, bytes]:
    archive = tmp_path / "x.deb"
    archive.write_bytes(data)
    return dict(debian.package_files(archive, everything))


def test_files_of_a_package_read_back(tmp_path: Path) -> None:
    assert read(tmp_path, builders.deb({"./a/b": b"1", "./c": b"22"})) == {"a/b": b"1", "c": b"22"}


def test_only_wanted_files_are_read(tmp_path: Path) -> None:
    archive = tmp_path / "x.deb"
    archive.write_bytes(builders.deb({"./a": b"1", "./b": b"2"}))
    assert dict(debian.package_files(archive, lambda path: path == "b")) == {"b": b"2"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "./a/../../b"])
def test_a_climbing_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="climbs"):
        read(tmp_path, builders.deb({name: b"x"}))


@pytest.mark.parametrize("data", [b"", b"hello world" * 20, b"!<arch>\n", b"!<arch>\n" + bytes(100)])
def test_what_is_no_package_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, data)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = builders.deb({"./a": b"1" * 100})
    for length in range(0, len(whole) - 1, 7):
        with pytest.raises(ConfigError):
            read(tmp_path, whole[:length])


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "UNPACKED_MAX", 1000)
    with pytest.raises(ConfigError, match="unpacks to more"):
        read(tmp_path, builders.deb({"./a": bytes(1001)}))
    monkeypatch.setattr(debian, "MEMBERS_MAX", 2)
    with pytest.raises(ConfigError, match="unpacks to more"):
        read(tmp_path, builders.deb({"./a": b"", "./b": b"", "./c": b""}))


def test_an_archive_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "ARCHIVE_MAX", 10)
    with pytest.raises(ConfigError, match="larger than"):
        read(tmp_path, builders.deb({"./a": b""}))


def test_an_unknown_compression_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compressed with zst"):
        read(tmp_path, builders.ar({"debian-binary": b"2.0\n", "data.tar.zst": b"x"}))


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    packed = bytearray(lzma.compress(builders.tar({"a": b"1" * 5000})))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(ConfigError, match="damaged"):
        read(tmp_path, builders.ar({"data.tar.xz": bytes(packed)}))


def test_the_real_package_is_the_dependency_with_the_version() -> None:
    text = "Package: linux-image-cloud-amd64\nDepends: linux-base, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n"
    package = debian.parse_real_package("linux-image-cloud-amd64", text)
    assert package == debian.Package("linux-image-6.1.0-56-cloud-amd64", "6.1.192-2")
    with pytest.raises(ConfigError, match="apt-get update"):
        debian.parse_real_package("nothing", "")
