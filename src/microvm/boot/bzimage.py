"""The bzImage container: a setup header, then a 64-bit program that unpacks the kernel it carries. [linux-boot]"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..errors import BootError
from ..memory import GuestMemory
from ..spec import bootparam
from . import elf, layout
from .image import BytesImage, Image, ImageSource, open_image

_HEAD: Final = bootparam.HEADER_END_MAX
_ALIGN_MAX: Final = 1 << 30
_ARM64_MAGIC: Final = (0x38, b"ARM\x64")


@dataclass(frozen=True, slots=True)
class BzImage:
    """A bzImage whose header passed the checks.

    ``header_bytes`` go into the zero page; ``code_offset`` and ``code_size`` are the protected-mode part of the file;
    ``payload_offset`` and ``payload_size`` the compressed kernel in it, size 0 where the header does not say.
    """

    header: bootparam.SetupHeader
    header_bytes: bytes
    code_offset: int
    code_size: int
    payload_offset: int
    payload_size: int

    @property
    def cmdline_size(self) -> int:
        """The longest command line the kernel takes, without the final NUL."""
        return self.header.cmdline_size or bootparam.CMDLINE_SIZE

    @property
    def initrd_addr_max(self) -> int:
        return self.header.initrd_addr_max or bootparam.INITRD_ADDR_MAX


def parse(image: Image) -> BzImage:
    """Check the setup header against the file. Raises BootError with what the file is, if it is no bzImage."""
    head = image.read(0, min(_HEAD, image.size))
    refuse_foreign(image.name, head)
    if len(head) < _HEAD:
        raise BootError(f"the {image.name} is not a kernel: neither ELF nor bzImage")
    header = bootparam.SetupHeader._make(bootparam.SETUP_HEADER.unpack_from(head, bootparam.HEADER_START))
    if header.magic != bootparam.HEADER_MAGIC or header.boot_flag != bootparam.BOOT_FLAG:
        raise BootError(f"the {image.name} is not a kernel: neither ELF nor bzImage")
    if header.version < bootparam.VERSION_64BIT or not header.xloadflags & bootparam.XLF_KERNEL_64:
        raise BootError(f"the {image.name} is a bzImage without a 64-bit entry (32-bit, or older than Linux 3.8)")
    header_end = bootparam.HEADER_END_BASE + head[bootparam.HEADER_END_BYTE]
    if not bootparam.HEADER_START + bootparam.SETUP_HEADER.size <= header_end <= _HEAD:
        raise BootError(f"the {image.name} has a setup header of an absurd length")
    code_offset = ((header.setup_sects or bootparam.DEFAULT_SETUP_SECTS) + 1) * bootparam.SECTOR
    code_size = header.syssize * 16
    available = image.size - code_offset
    # The size is counted in units of 16 bytes: the last one need not be whole.
    if code_size <= bootparam.ENTRY_64 or code_size > available + 15:
        raise BootError(
            f"the {image.name} is truncated: {code_size} bytes of code announced, {max(0, available)} there"
        )
    code_size = min(code_size, available)
    if header.payload_offset + header.payload_length > code_size:
        raise BootError(f"the {image.name} has its payload outside of the file")
    return BzImage(
        header,
        head[bootparam.HEADER_START : header_end],
        code_offset,
        code_size,
        code_offset + header.payload_offset,
        header.payload_length,
    )


def refuse_foreign(name: str, head: bytes) -> None:
    """Say what a file is when it is a well-known other thing. Raises BootError."""
    offset, magic = _ARM64_MAGIC
    if head[offset : offset + 4] == magic:
        raise BootError(f"the {name} is an arm64 Image, not a kernel for x86-64")
    if not head:
        raise BootError(f"the {name} is empty")
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")):
        raise BootError(f"the {name} is a compressed file; unpack it first")
    if head.startswith((b"070701", b"070702")):
        raise BootError(f"the {name} is a cpio archive: an initrd, not a kernel")
    if head.startswith(b"!<arch>"):
        raise BootError(f"the {name} is an archive (.deb or .a), not a kernel; unpack it first")


def place(image: Image, kernel: BzImage, memory: GuestMemory, ram_end: int) -> tuple[int, int]:
    """Copy the protected-mode code to where it likes to be. Returns its address and the end of what it needs.

    Raises BootError if RAM does not reach that far.
    """
    header = kernel.header
    gpa = header.pref_address
    align = header.kernel_alignment
    if header.relocatable_kernel and not 0x1000 <= align <= _ALIGN_MAX:
        raise BootError(f"the {image.name} has an absurd alignment of {align:#x}")
    needed = max(header.init_size, kernel.code_size)
    if gpa < layout.HIGH_RAM or gpa % 0x1000 or gpa >= layout.RAM_HOLE_START:
        raise BootError(f"the {image.name} wants to be loaded to {gpa:#x}, where it cannot be")
    if gpa + needed > ram_end:
        raise BootError(
            f"the {image.name} needs memory up to {gpa + needed:#x}, but RAM ends at {ram_end:#x}: give more memory"
        )
    with memory.view(gpa, kernel.code_size) as view:
        image.read_into(kernel.code_offset, view)
    memory.written(gpa, kernel.code_size)
    return gpa, gpa + needed


def extract(image: Image, kernel: BzImage) -> bytes | bytearray | None:
    """The ELF kernel in the payload, or None if this host cannot decode it or it is no ELF file. Raises BootError."""
    from . import codecs  # pulls in every compression module: only for kernels that need one

    if kernel.payload_size == 0:
        return None
    packed = memoryview(image.read(kernel.payload_offset, kernel.payload_size))
    data = packed.obj if elf.is_elf(bytes(packed[:4])) else codecs.unpack(packed)
    if not isinstance(data, (bytes, bytearray)) or not elf.is_elf(bytes(data[:4])):
        return None
    return data


def extract_vmlinux(source: ImageSource) -> bytes | bytearray | None:
    """The ELF kernel inside a bzImage, or None if there is none that this host can decode.

    For callers that keep the result (by a hash of the bzImage): unpacking xz takes seconds. What it returns loads like
    any ELF kernel. Raises BootError if ``source`` is not a sound bzImage.
    """
    image = open_image("kernel", source)
    if elf.is_elf(image.read(0, min(4, image.size))):
        return None
    return extract(image, parse(image))


def as_image(data: bytes | bytearray) -> Image:
    """An unpacked kernel, to be loaded."""
    return BytesImage("unpacked kernel", data)
