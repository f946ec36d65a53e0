"""Reading an ELF kernel: checked headers first, then one copy of each segment into the guest.

Every offset and size comes from the file and is compared, as a Python integer that cannot wrap, with the file's size
and with the guest's RAM before anything is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import BootError
from ..memory import GuestMemory
from ..spec import elf, pvh
from . import layout
from .image import Image

PHDRS_MAX: Final = 128  # kernels have four to ten; the field would allow 65535
NOTES_MAX: Final = 64 << 10  # bytes of notes looked at; vmlinux has about 500
_ZERO_BLOCK: Final = 64 << 10
_ZEROES: Final = bytes(_ZERO_BLOCK)


@dataclass(frozen=True, slots=True)
class ElfKernel:
    """A kernel that passed the checks. Addresses are guest-physical."""

    entry: int
    segments: tuple[elf.Phdr, ...]
    pvh_entry: int | None

    @property
    def start(self) -> int:
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        return max(segment.paddr + segment.memsz for segment in self.segments)

    def holds(self, gpa: int) -> bool:
        """Whether ``gpa`` is in what a segment takes from the file."""
        return any(segment.paddr <= gpa < segment.paddr + segment.filesz for segment in self.segments)


def is_elf(head: bytes) -> bool:
    return head.startswith(elf.MAGIC)


def parse(image: Image, ram_end: int) -> ElfKernel:
    """Check the headers against the file and against RAM that ends at ``ram_end``. Raises BootError."""
    if image.size < elf.EHDR.size:
        raise BootError(f"the {image.name} is truncated: not even an ELF header is there")
    header = elf.Ehdr._make(elf.EHDR.unpack(image.read(0, elf.EHDR.size)))
    _check_header(image, header)
    table = image.read(header.phoff, header.phnum * elf.PHDR.size)
    phdrs = [elf.Phdr._make(fields) for fields in elf.PHDR.iter_unpack(table)]
    segments = sorted((p for p in phdrs if p.type == elf.PT_LOAD and p.memsz), key=lambda p: p.paddr)
    if not segments:
        raise BootError(f"the {image.name} has nothing to load")
    _check_segments(image, segments, ram_end)
    kernel = ElfKernel(header.entry, tuple(segments), _pvh_entry(image, phdrs))
    entry = kernel.entry if kernel.pvh_entry is None else kernel.pvh_entry
    if not kernel.holds(entry):
        raise BootError(f"the {image.name} starts at {entry:#x}, which is outside of what it loads")
    return kernel


def load(image: Image, kernel: ElfKernel, memory: GuestMemory) -> None:
    """Copy the segments. What a segment has beyond its file part must read as zeroes already. Raises BootError.

    A tail of zeroes in the file (Linux stores its .bss that way) is left out: the pages stay unused until touched.
    """
    for segment in kernel.segments:
        size = _without_zero_tail(image, segment.offset, segment.filesz)
        if size:
            with memory.view(segment.paddr, size) as view:
                image.read_into(segment.offset, view)
            memory.written(segment.paddr, size)


def _without_zero_tail(image: Image, offset: int, size: int) -> int:
    while size >= _ZERO_BLOCK and image.read(offset + size - _ZERO_BLOCK, _ZERO_BLOCK) == _ZEROES:
        size -= _ZERO_BLOCK
    return size


def _check_header(image: Image, header: elf.Ehdr) -> None:
    if header.magic != elf.MAGIC:
        raise BootError(f"the {image.name} is not an ELF file")
    if header.machine == elf.MACHINE_AARCH64:
        raise BootError(f"the {image.name} is for arm64, not for x86-64")
    if header.file_class != elf.CLASS_64:
        raise BootError(f"the {image.name} is a 32-bit ELF file; a 64-bit x86 kernel is needed")
    if header.data != elf.DATA_LITTLE or header.machine != elf.MACHINE_X86_64:
        raise BootError(f"the {image.name} is an ELF file for another processor, not for x86-64")
    if header.type not in (elf.TYPE_EXEC, elf.TYPE_DYN):
        raise BootError(f"the {image.name} is an ELF file that cannot be started (object file or core dump)")
    if header.phentsize != elf.PHDR.size or not 0 < header.phnum <= PHDRS_MAX:
        raise BootError(f"the {image.name} has an absurd ELF program header table")
    if header.phoff + header.phnum * elf.PHDR.size > image.size:
        raise BootError(f"the {image.name} is truncated: its ELF program headers are beyond the end")


def _check_segments(image: Image, segments: list[elf.Phdr], ram_end: int) -> None:
    free = layout.HIGH_RAM
    for segment in segments:
        end = segment.paddr + segment.memsz
        where = f"{segment.paddr:#x}-{end:#x}"
        if segment.filesz > segment.memsz:
            raise BootError(f"the {image.name} has an ELF segment with more bytes in the file than in memory")
        if segment.offset + segment.filesz > image.size:
            raise BootError(f"the {image.name} is truncated: the ELF segment for {where} is not all there")
        if segment.paddr < layout.HIGH_RAM:
            raise BootError(f"the {image.name} wants to be loaded to {where}, below 1 MiB")
        if end > ram_end:
            raise BootError(
                f"the {image.name} wants to be loaded to {where}, but RAM ends at {ram_end:#x}: give more memory"
                if end <= layout.RAM_HOLE_START
                else f"the {image.name} wants to be loaded to {where}, where there can be no RAM"
            )
        if segment.paddr < free:
            raise BootError(f"the {image.name} has ELF segments that overlap at {segment.paddr:#x}")
        free = end


def _pvh_entry(image: Image, phdrs: list[elf.Phdr]) -> int | None:
    """The 32-bit entry point from the Xen note, or None. [xen-pvh]"""
    budget = NOTES_MAX
    for phdr in phdrs:
        if phdr.type != elf.PT_NOTE:
            continue
        budget -= phdr.filesz
        if budget < 0:
            raise BootError(f"the {image.name} has more than {NOTES_MAX >> 10} KiB of ELF notes")
        notes = image.read(phdr.offset, phdr.filesz)
        entry = _find_pvh_note(notes, 8 if phdr.align == 8 else 4)
        if entry is not None:
            return entry
    return None


def _find_pvh_note(notes: bytes, align: int) -> int | None:
    position = 0
    while position + elf.NHDR.size <= len(notes):
        name_size, desc_size, kind = elf.NHDR.unpack_from(notes, position)
        name = position + elf.NHDR.size
        desc = _round_up(name + name_size, align)
        if desc + desc_size > len(notes):
            raise BootError("the kernel has a malformed ELF note")
        if kind == pvh.NOTE_PHYS32_ENTRY and notes[name : name + name_size] == pvh.NOTE_NAME:
            if desc_size not in (4, 8):
                raise BootError("the kernel has a malformed PVH note")
            return int.from_bytes(notes[desc : desc + desc_size], "little")
        position = _round_up(desc + desc_size, align)
    return None


def _round_up(value: int, align: int) -> int:
    return (value + align - 1) & -align
