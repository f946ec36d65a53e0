from __future__ import annotations

import bz2
import gzip
import lzma

import pytest

from microvm.errors import BootError
from microvm.images import bzimage

from . import builders

KERNEL = builders.elf(b"code" * 100)
PAYLOADS = {
    "gzip": gzip.compress(KERNEL),
    "xz": lzma.compress(KERNEL, check=lzma.CHECK_CRC32) + b"\x01\x02\x03\x04",
    "lzma": lzma.compress(KERNEL, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress(KERNEL),
    "lz4": builders.lz4_stored(KERNEL),
    "none": KERNEL,
}


@pytest.mark.parametrize("form", PAYLOADS)
def test_every_known_compression_is_undone(form: str) -> None:
    assert bzimage.extract_vmlinux(builders.bzimage(PAYLOADS[form])) == KERNEL


def test_relocations_behind_the_elf_file_are_dropped() -> None:
    payload = gzip.compress(builders.elf(b"code", tail=b"relocations"))
    assert bzimage.extract_vmlinux(builders.bzimage(payload)) == builders.elf(b"code")


def test_an_unknown_compression_or_an_old_protocol_is_left_to_the_kernel() -> None:
    assert bzimage.extract_vmlinux(builders.bzimage(b"\x28\xb5\x2f\xfd zstd")) is None
    assert bzimage.extract_vmlinux(builders.bzimage(PAYLOADS["gzip"], version=0x207)) is None


@pytest.mark.parametrize("image", [b"", b"MZ" + bytes(2000), KERNEL + bytes(1000)])
def test_what_is_no_bzimage_is_refused(image: bytes) -> None:
    with pytest.raises(BootError, match="not a bzImage"):
        bzimage.extract_vmlinux(image)


@pytest.mark.parametrize("form", PAYLOADS)
def test_a_truncated_bzimage_is_refused(form: str) -> None:
    image = builders.bzimage(PAYLOADS[form])
    with pytest.raises(BootError, match="truncated"):
        bzimage.extract_vmlinux(image[:-1])


@pytest.mark.parametrize("form", ["gzip", "xz", "lz4", "none"])
def test_a_cut_payload_is_refused(form: str) -> None:
    payload = PAYLOADS[form]
    with pytest.raises(BootError):
        bzimage.extract_vmlinux(builders.bzimage(payload[: len(payload) // 2]))


@pytest.mark.parametrize("form", ["gzip", "xz", "lz4"])
def test_a_bomb_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bzimage, "VMLINUX_MAX", 100)
    with pytest.raises(BootError, match=r"more than|too much"):
        bzimage.extract_vmlinux(builders.bzimage(PAYLOADS[form]))


def test_a_payload_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(BootError, match="ELF"):
        bzimage.extract_vmlinux(builders.bzimage(gzip.compress(b"hello" * 100)))
