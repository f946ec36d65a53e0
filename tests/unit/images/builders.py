"""Small valid inputs for the tests beside it: ELF files, kernel modules, bzImages, Debian packages."""

from __future__ import annotations

import io
import lzma
import struct
import tarfile


def elf(payload: bytes = b"kernel", tail: bytes = b"") -> bytes:
    """An ELF executable with one segment, and bytes after its end."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x100_0000, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0, 0x100_0000, len(payload), len(payload), 4096)
    return header + segment + payload + tail


def module(*, depends: str = "", softdep: str = "") -> bytes:
    """A kernel module that is nothing but its .modinfo."""
    info = b"license=GPL\0depends=" + depends.encode() + b"\0"
    if softdep:
        info += b"softdep=" + softdep.encode() + b"\0"
    names = b"\0.modinfo\0.shstrtab\0"
    body = info + names
    table = 64 + len(body)
    section = struct.Struct("<IIQQQQIIQQ")
    sections = (
        section.pack(*[0] * 10)
        + section.pack(1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
        + section.pack(10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    )
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    return header + body + sections


def bzimage(payload: bytes, *, version: int = 0x20F) -> bytes:
    """A bzImage with one setup sector and the payload right behind it."""
    image = bytearray(2 * 512)
    image[0x1F1] = 1
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<II", image, 0x248, 0, len(payload))
    return bytes(image) + payload


def lz4_stored(data: bytes) -> bytes:
    """A legacy LZ4 frame that compresses nothing."""
    length = len(data)
    block = bytearray()
    if length < 15:
        block.append(length << 4)
    else:
        block.append(0xF0)
        rest = length - 15
        block += b"\xff" * (rest // 255)
        block.append(rest % 255)
    block += data
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + bytes(block) + struct.pack("<I", length)


def tar(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    """A Unix archive."""
    out = b"!<arch>\n"
    for name, data in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += header + data + b"\n" * (len(data) % 2)
    return out


def deb(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files in it."""
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": b"", "data.tar.xz": lzma.compress(tar(files))})


def kernel_deb(version: str = "6.1.0-9-test") -> bytes:
    """A kernel package with a bzImage and the modules of a chain."""
    base = f"./lib/modules/{version}/kernel"
    return deb(
        {
            f"./boot/vmlinuz-{version}": bzimage(lz4_stored(elf())),
            f"./boot/config-{version}": b"CONFIG_64BIT=y\n",
            f"{base}/drivers/virtio/virtio.ko": module(depends="virtio_ring"),
            f"{base}/drivers/virtio/virtio_ring.ko": module(),
            f"{base}/drivers/virtio/virtio_mmio.ko": module(depends="virtio_ring,virtio"),
            f"{base}/drivers/block/virtio_blk.ko": module(depends="virtio"),
            f"{base}/drivers/usb/unwanted.ko": b"not even a module",
        }
    )
