"""Everything that is not a bootable kernel is one sentence."""

from __future__ import annotations

import bz2
import lzma
import struct
import types

import pytest

from microvm import boot
from microvm.boot import codecs
from microvm.errors import BootError
from microvm.memory import GuestMemory
from microvm.spec import elf
from microvm.testing.kernels import LOAD_GPA, TEXT, ehdr, gzip_payload, make_bzimage, make_elf, phdr

MIB = 1 << 20


def segments(*table: bytes, body: bytes = TEXT, entry: int = LOAD_GPA) -> bytes:
    return ehdr(len(table), entry) + b"".join(table) + body


def at(paddr: int, filesz: int = 0x100, memsz: int | None = None, offset: int = 0x200) -> bytes:
    return phdr(elf.PT_LOAD, offset, paddr, filesz, memsz)


CASES = {
    "empty": (b"", "is empty"),
    "text": (b"#!/bin/sh\n" * 200, "not a kernel"),
    "short text": (b"hello", "not a kernel"),
    "zeroes": (bytes(8192), "not a kernel"),
    "arm64 image": (bytes(0x38) + b"ARM\x64" + bytes(4096), "arm64"),
    "arm64 elf": (make_elf(machine=183), "arm64"),
    "gzip file": (gzip_payload(b"x" * 100), "compressed file"),
    "cpio": (b"070701" + bytes(4096), "initrd"),
    "deb": (b"!<arch>\n" + bytes(4096), "unpack it first"),
    "32-bit elf": (make_elf(file_class=1, machine=3), "32-bit"),
    "big endian elf": (make_elf(data=2), "another processor"),
    "object file": (make_elf(type=1), "cannot be started"),
    "elf magic only": (b"\x7fELF", "truncated"),
    "no program headers": (make_elf(phnum=0), "absurd"),
    "many program headers": (make_elf(phnum=65535), "absurd"),
    "odd program header size": (make_elf(phentsize=55), "absurd"),
    "program headers beyond the end": (make_elf(phoff=1 << 40), "beyond the end"),
    "program header offset that wraps": (make_elf(phoff=(1 << 64) - 8), "beyond the end"),
    "truncated elf": (make_elf()[:-1], "truncated: the ELF segment for .* is not all there"),
    "nothing to load": (segments(phdr(elf.PT_NOTE, 120, 0, 0)), "nothing to load"),
    "file part larger than memory part": (segments(at(LOAD_GPA, 0x100, 0x80)), "more bytes in the file"),
    "segment in low memory": (segments(at(0x7000)), "below 1 MiB"),
    "segment over the ACPI tables": (segments(at(0xE0000)), "below 1 MiB"),
    "segment beyond RAM": (segments(at(64 * MIB - 0x80)), "give more memory"),
    "segment in the hole": (segments(at(0xFEE0_0000)), "no RAM"),
    "segment that wraps": (segments(at((1 << 64) - 0x80)), "no RAM"),
    "segment with absurd memory": (segments(at(LOAD_GPA, 0x100, (1 << 64) - 1)), "no RAM"),
    "overlapping segments": (segments(at(LOAD_GPA), at(LOAD_GPA + 0xFF)), "overlap"),
    "entry outside": (segments(at(LOAD_GPA), entry=LOAD_GPA + 0x100), "outside of what it loads"),
    "entry in the zeroed part": (segments(at(LOAD_GPA, 0x10, 0x100), entry=LOAD_GPA + 0x20), "outside"),
    "pvh entry outside": (make_elf(note_entry=0x5000), "outside of what it loads"),
    "endless note": (
        make_elf().replace(struct.pack("<III", 4, 8, 18), struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 18)),
        "malformed ELF note",
    ),
    "pvh note of odd size": (
        make_elf().replace(struct.pack("<III", 4, 8, 18), struct.pack("<III", 4, 6, 18)),
        "malformed PVH note",
    ),
    "megabytes of notes": (segments(at(LOAD_GPA), phdr(elf.PT_NOTE, 0, 0, 1 << 62)), "ELF notes"),
    "old protocol": (make_bzimage(version=0x20B), "64-bit entry"),
    "32-bit bzImage": (make_bzimage(xloadflags=0), "64-bit entry"),
    "truncated bzImage": (make_bzimage()[:-16], "truncated"),
    "bzImage header only": (make_bzimage()[:1024], "truncated"),
    "bzImage cut in its header": (make_bzimage()[:0x250], "not a kernel"),
    "absurd code size": (make_bzimage(syssize=0xFFFFFFFF), "truncated"),
    "no code": (make_bzimage(syssize=1), "truncated"),
    "absurd header length": (make_bzimage(jump=0xFFEB), "absurd length"),
    "payload outside": (make_bzimage(payload_offset=0xFFFFFFFF, payload_length=0xFFFFFFFF), "payload outside"),
    "load address in low memory": (make_bzimage(pref_address=0), "where it cannot be"),
    "load address in the hole": (make_bzimage(pref_address=0xFEE0_0000), "where it cannot be"),
    "load address that wraps": (make_bzimage(pref_address=(1 << 64) - 0x1000), "where it cannot be"),
    "odd load address": (make_bzimage(pref_address=LOAD_GPA + 1), "where it cannot be"),
    "needs more memory": (make_bzimage(init_size=0xFFFFFFFF), "give more memory"),
    "absurd alignment": (make_bzimage(kernel_alignment=0), "alignment"),
    "corrupt gzip payload": (
        make_bzimage(gzip_payload(make_elf())[:40] + b"\xff" * 60 + b"\0\x10\0\0"),
        "corrupt|truncated",
    ),
    "payload that claims 4 GiB": (
        make_bzimage(gzip_payload(make_elf())[:-4] + b"\xff\xff\xff\xff"),
        "claims to unpack",
    ),
    "payload that claims too much": (make_bzimage(gzip_payload(make_elf())[:-4] + b"\0\0\x10\0"), "corrupt|truncated"),
    "tiny payload": (make_bzimage(b"\x1f\x8b\x08\0"), "payload is truncated"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_kernel_is_one_sentence(case: str) -> None:
    kernel, message = CASES[case]
    with pytest.raises(BootError, match=message) as caught:
        boot.load(GuestMemory.allocate(64 * MIB), kernel)
    assert "\n" not in str(caught.value)


def sized(packed: bytes, size: int) -> bytes:
    return packed + struct.pack("<I", size)


def test_every_standard_compression_is_unpacked() -> None:
    kernel = make_elf()
    payloads = {
        "gzip": gzip_payload(kernel),
        "xz": sized(lzma.compress(kernel, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32), len(kernel)),
        "lzma": sized(lzma.compress(kernel, lzma.FORMAT_ALONE), len(kernel)),
        "bzip2": sized(bz2.compress(kernel), len(kernel)),
        "none": kernel,
    }
    for name, payload in payloads.items():
        assert boot.extract_vmlinux(make_bzimage(payload)) == kernel, name


def test_lz4_and_zstd_are_unpacked_where_the_host_has_them() -> None:
    kernel = make_elf()
    # One LZ4 block of literals only: token 0xf0, the length in steps of 255, then the bytes.
    count = len(kernel) - 15
    block = b"\xf0" + b"\xff" * (count // 255) + bytes([count % 255]) + kernel
    lz4 = b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block
    # One zstd frame of one raw block: magic, single segment with a 4-byte content size, last raw block.
    zstd = (
        b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(kernel)) + (len(kernel) << 3 | 1).to_bytes(3, "little") + kernel
    )
    for payload in (lz4, zstd):
        assert boot.extract_vmlinux(make_bzimage(sized(payload, len(kernel)))) in (kernel, None)


def test_payload_without_a_decoder_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*names: str) -> None:
        raise codecs.Unsupported(names[0])

    monkeypatch.setattr(codecs, "_library", missing)
    payload = b"\x02\x21\x4c\x18" + bytes(64) + struct.pack("<I", 1000)
    assert boot.extract_vmlinux(make_bzimage(payload)) is None
    assert boot.load(GuestMemory.allocate(64 * MIB), make_bzimage(payload)).protocol == "bzimage"


class Untouchable:
    """A library whose functions may be looked up, not called."""

    def __getattr__(self, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace()


@pytest.mark.parametrize("length", [0, 0x60, 0x7FFFFFFF, 0xFFFFFFFF])
def test_lz4_block_length_is_checked_before_the_library_sees_it(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    payload = b"\x02\x21\x4c\x18" + struct.pack("<I", length) + b"\x10" * 64 + struct.pack("<I", 1000)
    monkeypatch.setattr(codecs, "_library", lambda *names: Untouchable())
    with pytest.raises(BootError, match=r"corrupt|truncated"):
        boot.extract_vmlinux(make_bzimage(payload))


def test_payload_that_is_no_elf_is_left_to_the_kernel() -> None:
    assert boot.extract_vmlinux(make_bzimage(gzip_payload(b"not an ELF file" * 10))) is None
    assert boot.extract_vmlinux(make_bzimage(payload_length=0)) is None
    assert boot.extract_vmlinux(make_elf()) is None


def test_gzip_bomb_stops_at_the_size_it_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip_payload(bytes(64 * MIB))
    lie = bomb[:-4] + struct.pack("<I", 1000)
    asked: list[int] = []
    real = codecs.zlib.decompressobj

    class Spy:
        def __init__(self, window: int) -> None:
            self._real = real(window)

        def decompress(self, data: memoryview, limit: int) -> bytes:
            asked.append(limit)
            return self._real.decompress(data, limit)

    monkeypatch.setattr(codecs.zlib, "decompressobj", Spy)
    assert boot.extract_vmlinux(make_bzimage(lie)) is None  # 1000 zeroes are no kernel
    assert asked == [1000]
    monkeypatch.setattr(codecs, "UNPACKED_MAX", 32 * MIB)
    with pytest.raises(BootError, match="claims to unpack"):
        boot.extract_vmlinux(make_bzimage(bomb))
