"""Make erofs images without being root, and change the owner of files inside one.

``mkfs.erofs`` takes owners from the files it packs, and only root can make files that belong to somebody else. So
everything is packed as root's, and the few inodes that are not get their owner afterwards, in the finished image:
[linux] fs/erofs/erofs_fs.h. The super block's checksum covers the rest of its block too, and with it the first
inodes, so the images are made without one.
"""

from __future__ import annotations

import stat
import struct
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Final

from microvm.errors import ConfigError, HostError
from microvm.images import cache

SUPER_OFFSET: Final = 1024
MAGIC: Final = 0xE0F5E1E2
_SLOT: Final = 32  # an inode number counts slots of this size from the meta data's block
_DIRENT: Final = struct.Struct("<QHBB")
_LAYOUT_PLAIN: Final = 0
_LAYOUT_INLINE: Final = 2
_DIRECTORY_MAX: Final = 16 << 20
_UUID: Final = "5b3c1f6e-6d69-4372-8f76-6d726f6f7421"  # fixed: the same files give the same image


def is_erofs(path: Path) -> bool:
    """Whether the file starts as an erofs image does."""
    with open(path, "rb") as file:
        file.seek(SUPER_OFFSET)
        return file.read(4) == MAGIC.to_bytes(4, "little")


def make(tree: Path, image: Path, owners: Mapping[str, tuple[int, int]], *, times: int | None, compress: bool) -> None:
    """Pack a directory. ``owners`` maps paths (no leading slash) to (uid, gid) where that is not root.

    ``times`` is the modification time of every file, None to keep theirs (larger meta data). Raises MissingTools,
    HostError.
    """
    cache.need_tools("making an erofs image", {"mkfs.erofs": "erofs-utils"})
    command = ["mkfs.erofs", "--quiet", "--all-root", f"-U{_UUID}", "-x-1", "-Enosbcrc"]
    if compress:
        command.append("-zlz4hc")
    if times is not None:
        command += [f"-T{times}", "--ignore-mtime"]
    if any(uid > 0xFFFF or gid > 0xFFFF for uid, gid in owners.values()):
        command.append("-Eforce-inode-extended")
    done = subprocess.run([*command, str(image), str(tree)], capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HostError("mkfs.erofs", done.returncode, lines[-1] if lines else "failed")
    with open(image, "r+b") as file:
        reader = Reader(file)
        for path, (uid, gid) in owners.items():
            reader.set_owner(path, uid, gid)


class Reader:
    """Finds inodes in an erofs image. Raises ConfigError for one that is damaged or uses what is not known here."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        file.seek(SUPER_OFFSET)
        block = file.read(128)
        if len(block) < 128 or int.from_bytes(block[:4], "little") != MAGIC:
            raise ConfigError("image", getattr(file, "name", ""), "not an erofs image")
        self._block = 1 << block[12]
        self._root = int.from_bytes(block[14:16], "little")
        self._meta = int.from_bytes(block[40:44], "little") * self._block
        if not 9 <= block[12] <= 16:
            raise ConfigError("image", getattr(file, "name", ""), "a damaged erofs image: block size")

    def inode(self, path: str) -> int:
        """The inode number of a path (no leading slash; the empty path is the root). Raises ConfigError if missing."""
        nid = self._root
        for part in path.split("/") if path else []:
            for name, child in self.entries(nid):
                if name == part.encode():
                    nid = child
                    break
            else:
                raise ConfigError("path", path, "not in the image")
        return nid

    def owner(self, path: str) -> tuple[int, int]:
        """(uid, gid) of a path."""
        offset, extended = self._at(self.inode(path))
        self._file.seek(offset + 24)
        return struct.unpack("<II", self._file.read(8)) if extended else struct.unpack("<HH", self._file.read(4))

    def mode(self, path: str) -> int:
        """The mode with its type bits."""
        offset, _ = self._at(self.inode(path))
        self._file.seek(offset + 4)
        return int.from_bytes(self._file.read(2), "little")

    def set_owner(self, path: str, uid: int, gid: int) -> None:
        """Write another owner into the inode of a path; the file must be open for writing."""
        offset, extended = self._at(self.inode(path))
        if not extended and max(uid, gid) > 0xFFFF:
            raise ConfigError("owner", f"{uid}:{gid}", "at most 65535 in this image")
        self._file.seek(offset + 24)
        self._file.write(struct.pack("<II" if extended else "<HH", uid, gid))

    def entries(self, nid: int) -> Iterator[tuple[bytes, int]]:
        """Names and inode numbers of a directory."""
        offset, extended = self._at(nid)
        self._file.seek(offset)
        inode = self._file.read(64 if extended else 32)
        layout = int.from_bytes(inode[:2], "little") >> 1 & 7
        mode = int.from_bytes(inode[4:6], "little")
        size = int.from_bytes(inode[8:16] if extended else inode[8:12], "little")
        if not stat.S_ISDIR(mode) or size > _DIRECTORY_MAX or layout not in (_LAYOUT_PLAIN, _LAYOUT_INLINE):
            raise ConfigError("image", "", "an erofs directory that cannot be read here")
        xattrs = int.from_bytes(inode[2:4], "little")
        first = int.from_bytes(inode[16:20], "little") * self._block
        inline = offset + len(inode) + (12 + (xattrs - 1) * 4 if xattrs else 0)
        for start in range(0, size, self._block):
            length = min(self._block, size - start)
            tail = layout == _LAYOUT_INLINE and start + self._block > size
            self._file.seek(inline if tail else first + start)
            yield from _dirents(self._file.read(length))

    def _at(self, nid: int) -> tuple[int, bool]:
        offset = self._meta + nid * _SLOT
        self._file.seek(offset)
        head = self._file.read(2)
        if len(head) < 2:
            raise ConfigError("image", "", "an erofs inode beyond the end")
        return offset, bool(head[0] & 1)


def _dirents(block: bytes) -> Iterator[tuple[bytes, int]]:
    if len(block) < _DIRENT.size:
        return
    names = _DIRENT.unpack_from(block)[1]
    if names < _DIRENT.size or names > len(block):
        raise ConfigError("image", "", "a damaged erofs directory")
    heads = [_DIRENT.unpack_from(block, at) for at in range(0, names - names % _DIRENT.size, _DIRENT.size)]
    ends = [head[1] for head in heads[1:]] + [len(block)]
    for head, end in zip(heads, ends, strict=True):
        yield block[head[1] : end].split(b"\0", 1)[0], head[0]
