from __future__ import annotations

import lzma

import pytest

from microvm.errors import ConfigError
from microvm.images import modules

from . import builders
from .test_cpio import parse


def test_modules_come_after_what_they_need() -> None:
    available = {
        "erofs": builders.module(depends="libcrc32c"),
        "libcrc32c": builders.module(softdep="pre: crc32c"),
        "crc32c_generic": builders.module(),
        "virtio_blk": builders.module(depends="virtio_ring,virtio"),
        "virtio": builders.module(depends="virtio_ring"),
        "virtio_ring": builders.module(),
        "unrelated": builders.module(),
    }
    order = modules.load_order(available, ["virtio_blk", "erofs", "built_in"])
    assert order == ["virtio_ring", "virtio", "virtio_blk", "crc32c_generic", "libcrc32c", "erofs"]


def test_a_ring_of_dependencies_ends() -> None:
    available = {"a": builders.module(depends="b"), "b": builders.module(depends="a")}
    assert modules.load_order(available, ["a"]) == ["b", "a"]


def test_a_long_chain_does_not_exhaust_the_stack() -> None:
    available = {f"m{index}": builders.module(depends=f"m{index + 1}") for index in range(3000)}
    assert modules.load_order(available, ["m0"])[0] == "m2999"


def test_names_are_the_kernels_own() -> None:
    assert modules.module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz") == "virtio_rng"
    assert modules.requirements(builders.module(depends="a-b,c")) == ["a_b", "c"]


def test_compressed_modules_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert modules.unpacked("a.ko", b"x") == b"x"
    assert modules.unpacked("a.ko.xz", lzma.compress(b"x" * 100)) == b"x" * 100
    with pytest.raises(ConfigError, match="cannot be read"):
        modules.unpacked("a.ko.zst", b"")
    with pytest.raises(ConfigError, match="damaged"):
        modules.unpacked("a.ko.xz", b"junk")
    monkeypatch.setattr(modules, "MODULE_MAX", 50)
    with pytest.raises(ConfigError, match="more than"):
        modules.unpacked("a.ko.xz", lzma.compress(b"x" * 100))


@pytest.mark.parametrize("data", [b"", b"\x7fELF", builders.elf(), builders.module()[:-1]])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="not a kernel module"):
        modules.modinfo(data)


def test_signatures_are_cut_off() -> None:
    signed = b"module" + b"S" * 300 + b"\0\0\2\0\0\0\0\0" + (300).to_bytes(4, "big") + b"~Module signature appended~\n"
    assert modules.without_signature(signed) == b"module"
    assert modules.without_signature(b"module") == b"module"
    lying = b"module" + b"\0\0\2\0\0\0\0\0" + (1 << 31).to_bytes(4, "big") + b"~Module signature appended~\n"
    assert modules.without_signature(lying) == lying


def test_the_archive_numbers_modules_and_keeps_late_ones_apart() -> None:
    available = {
        "virtio_blk": builders.module(depends="virtio"),
        "virtio": builders.module(),
        "ext4": builders.module(depends="jbd2,virtio"),
        "jbd2": builders.module(),
    }
    files = [path for path in parse(modules.modules_cpio(available)) if path.endswith(".ko")]
    assert files == [
        "lib/modules-boot/00-virtio.ko",
        "lib/modules-boot/01-virtio_blk.ko",
        "lib/modules-late/00-jbd2.ko",
        "lib/modules-late/01-ext4.ko",
    ]
