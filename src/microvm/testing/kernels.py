"""Hand-made kernels, as small as the formats allow."""

from __future__ import annotations

import struct
import zlib

from ..spec import bootparam, elf, pvh

TEXT = b"\xf4" * 0x300
LOAD_GPA = 0x100_0000


def note(entry: int = LOAD_GPA + 0x10, size: int = 8) -> bytes:
    name = pvh.NOTE_NAME
    return (
        elf.NHDR.pack(len(name), size, pvh.NOTE_PHYS32_ENTRY)
        + name
        + entry.to_bytes(8, "little")[:size].ljust(8, b"\0")
    )


def phdr(kind: int, offset: int, paddr: int, filesz: int, memsz: int | None = None, align: int = 4) -> bytes:
    return elf.PHDR.pack(kind, 7, offset, paddr, paddr, filesz, filesz if memsz is None else memsz, align)


def ehdr(phnum: int, entry: int = LOAD_GPA, **changes: int) -> bytes:
    fields = elf.Ehdr(
        elf.MAGIC, elf.CLASS_64, elf.DATA_LITTLE, 1, 0, 0, elf.TYPE_EXEC, elf.MACHINE_X86_64, 1,
        entry, 64, 0, 0, 64, 56, phnum, 0, 0, 0,
    )  # fmt: skip
    values = fields._asdict() | changes
    return elf.EHDR.pack(*values.values())


def make_elf(with_note: bool = True, entry: int = LOAD_GPA, note_entry: int = LOAD_GPA + 0x10, **changes: int) -> bytes:
    """One segment of `TEXT` at `LOAD_GPA` with as much zero memory behind it, and the PVH note."""
    notes = note(note_entry) if with_note else b""
    count = 2 if with_note else 1
    fields = {"phnum": count, "entry": entry} | changes
    start = 64 + 56 * count
    table = phdr(elf.PT_LOAD, start + len(notes), LOAD_GPA, len(TEXT), 2 * len(TEXT))
    if with_note:
        table += phdr(elf.PT_NOTE, start, 0, len(notes))
    return ehdr(**fields) + table + notes + TEXT


def gzip_payload(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return packer.compress(data) + packer.flush()


def make_bzimage(payload: bytes = b"", **changes: int) -> bytes:
    """A bzImage whose code is `TEXT` followed by ``payload``."""
    code = TEXT + payload
    code += bytes(-len(code) % 16)
    fields = dict.fromkeys(bootparam.SetupHeader._fields, 0)
    fields |= {
        "setup_sects": 1,
        "syssize": len(code) // 16,
        "boot_flag": bootparam.BOOT_FLAG,
        "jump": 0x6AEB,
        "magic": bootparam.HEADER_MAGIC,
        "version": 0x20F,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x20_0000,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "payload_offset": len(TEXT),
        "payload_length": len(payload),
        "pref_address": LOAD_GPA,
        "init_size": 0x10_0000,
    }
    fields |= changes
    image = bytearray(1024)
    bootparam.SETUP_HEADER.pack_into(image, bootparam.HEADER_START, *fields.values())
    return bytes(image) + code


def u32(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<I", data, offset)[0]
    return value


def u64(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from("<Q", data, offset)[0]
    return value
