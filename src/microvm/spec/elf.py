"""ELF-64 wire layouts, as far as a kernel loader reads them. [ELF-64 1.5]"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

MAGIC: Final = b"\x7fELF"
CLASS_64: Final = 2
DATA_LITTLE: Final = 1
TYPE_EXEC: Final = 2
TYPE_DYN: Final = 3
MACHINE_386: Final = 3
MACHINE_X86_64: Final = 62
MACHINE_AARCH64: Final = 183
PT_LOAD: Final = 1
PT_NOTE: Final = 4

EHDR: Final = Struct("<4sBBBBB7xHHIQQQIHHHHHH")
PHDR: Final = Struct("<IIQQQQQQ")
NHDR: Final = Struct("<III")
assert EHDR.size == 64
assert PHDR.size == 56


class Ehdr(NamedTuple):
    """The file header."""

    magic: bytes
    file_class: int
    data: int
    ident_version: int
    os_abi: int
    abi_version: int
    type: int
    machine: int
    version: int
    entry: int
    phoff: int
    shoff: int
    flags: int
    ehsize: int
    phentsize: int
    phnum: int
    shentsize: int
    shnum: int
    shstrndx: int


class Phdr(NamedTuple):
    """One program header. Sizes and offsets are bytes."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int
