from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from microvm.errors import ConfigError
from microvm.images import cache, debian, kernelbuild, kernels

from . import builders


def add(entry: str, kind: str, created: str, **more: str) -> None:
    def make(out: Path) -> dict[str, Any]:
        (out / "vmlinux").write_bytes(b"\x7fELF")
        return {"kind": kind, "version": "6.1", "created": created, **more}

    cache.obtain("kernels", entry, make)


def test_without_a_kernel_the_error_says_what_to_run() -> None:
    with pytest.raises(ConfigError, match="microvm kernel fetch cloud"):
        kernels.default()
    with pytest.raises(ConfigError, match="microvm kernel build"):
        kernels.resolve("tuned")
    with pytest.raises(ConfigError, match="microvm kernel fetch generic"):
        kernels.resolve("generic")


def test_tuned_goes_before_cloud_before_generic() -> None:
    add("generic-1", "generic", "2024-03")
    assert kernels.default().kind == "generic"
    add("cloud-1", "cloud", "2024-02")
    assert kernels.default().kind == "cloud"
    add("tuned-1", "tuned", "2024-01")
    assert kernels.default().kind == "tuned"
    assert [kernel.name for kernel in kernels.list()] == ["generic-1", "cloud-1", "tuned-1"]


def test_the_tuned_kernel_of_this_configuration_goes_before_a_newer_one() -> None:
    add("tuned-a", "tuned", "2024-01", fragment=kernels._fragment_hash())
    add("tuned-b", "tuned", "2024-02", fragment="another")
    assert kernels.default().name == "tuned-a"
    kernels.remove("tuned-a")
    assert kernels.default().name == "tuned-b"


def test_kernels_resolve_by_kind_entry_and_path(tmp_path: Path) -> None:
    add("cloud-1", "cloud", "2024")
    assert kernels.resolve("cloud").name == "cloud-1"
    assert kernels.resolve("cloud-1").path.name == "vmlinux"
    assert kernels.resolve(None).name == "cloud-1"
    mine = tmp_path / "vmlinuz"
    mine.write_bytes(b"x")
    given = kernels.resolve(mine)
    assert (given.kind, given.path, given.initrd) == ("file", mine, None)


def test_what_is_not_there_or_no_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        kernels.resolve(tmp_path / "missing")
    with pytest.raises(ConfigError, match="not a file"):
        kernels.resolve(tmp_path)


def test_a_package_file_becomes_a_kernel_with_modules(tmp_path: Path) -> None:
    archive = tmp_path / "linux-image.deb"
    archive.write_bytes(builders.kernel_deb())
    kernel = kernels.resolve(archive)
    assert kernel.version == "6.1.0-9-test"
    assert kernel.path.read_bytes() == builders.elf()
    assert kernel.bzimage is not None
    assert kernel.initrd is not None
    assert b"lib/modules-boot/00-virtio_ring.ko" in kernel.initrd.read_bytes()
    assert kernels.resolve(archive) == kernel


def test_a_package_without_a_kernel_leaves_no_entry(tmp_path: Path) -> None:
    archive = tmp_path / "x.deb"
    archive.write_bytes(builders.deb({"./usr/bin/true": b""}))
    with pytest.raises(ConfigError, match="holds no kernel"):
        kernels.resolve(archive)
    assert kernels.list() == ()


def test_fetch_unpacks_what_apt_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: debian.Package, into: Path) -> Path:
        (into / "k.deb").write_bytes(builders.kernel_deb())
        return into / "k.deb"

    monkeypatch.setattr(debian, "real_package", lambda meta: debian.Package("linux-image-x", "1:6.1-1"))
    monkeypatch.setattr(debian, "download", download)
    kernel = kernels.fetch("cloud")
    assert (kernel.name, kernel.kind) == ("cloud-1+6.1-1", "cloud")
    with pytest.raises(ConfigError):
        kernels.fetch("tuned")


def test_the_build_key_covers_fragment_and_source(tmp_path: Path) -> None:
    one, two = tmp_path / "linux-source-6.1.tar.xz", tmp_path / "linux-source-6.12.tar.xz"
    one.write_bytes(b"1")
    two.write_bytes(b"1")
    keys = {
        kernelbuild.key(one, b"CONFIG_A=y\n"),
        kernelbuild.key(one, b"CONFIG_A=n\n"),
        kernelbuild.key(two, b"CONFIG_A=y\n"),
    }
    assert len(keys) == 3
    assert kernelbuild.key(one, b"CONFIG_A=y\n") in keys
    commented = b"# why\nCONFIG_A=y\n\n"
    assert kernelbuild.key(one, commented) == kernelbuild.key(one, b"CONFIG_A=y\n")
    assert kernelbuild.key(one, commented + b"# CONFIG_B is not set\n") != kernelbuild.key(one, commented)


def test_options_that_the_source_drops_are_found() -> None:
    wanted = "# comment\nCONFIG_A=y\nCONFIG_B=32\nCONFIG_C=n\nCONFIG_D=y\n"
    assert kernelbuild.dropped_options(wanted, "CONFIG_A=y\nCONFIG_B=64\n") == ["CONFIG_B=32", "CONFIG_D=y"]


def test_the_fragment_has_what_the_machine_model_offers() -> None:
    lines = kernelbuild.fragment().decode().splitlines()
    for option in [
        "VIRTIO_MMIO",
        "VIRTIO_BLK",
        "VIRTIO_CONSOLE",
        "VIRTIO_VSOCKETS",
        "VIRTIO_BALLOON",
        "PAGE_REPORTING",
        "VMGENID",
        "PVH",
    ]:
        assert f"CONFIG_{option}=y" in lines
    options = [line.split("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert len(options) == len(set(options)), "an option twice"


def test_a_missing_source_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbuild, "SOURCES", tmp_path)
    with pytest.raises(cache.MissingTools, match=r"apt-get install linux-source-6\.1"):
        kernels.build()
    with pytest.raises(ConfigError, match="no such file"):
        kernels.build(source=tmp_path / "missing.tar.xz")
