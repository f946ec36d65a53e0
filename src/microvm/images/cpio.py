"""Write initramfs archives: the "newc" cpio format of [linux] Documentation/driver-api/early-userspace/buffer-format.

Uncompressed on purpose: unpacking costs guest time, and on the software CPU a lot of it. The output depends on nothing
but the entries: no inode numbers, owners or times of the host, except the modification times that entries carry (a
Python interpreter in the guest compares them with what its .pyc files say).
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable
from typing import Final

from microvm.errors import ConfigError

_FIELD_MAX: Final = 0xFFFF_FFFF  # header fields are eight hex digits
_TRAILER: Final = "TRAILER!!!"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory, symbolic link (``data`` is its target) or device of an archive.

    ``path`` has no leading slash. ``mode`` carries the type bits of ``stat``. ``device`` is (major, minor).
    """

    path: str
    mode: int
    data: bytes = b""
    mtime: int = 0
    device: tuple[int, int] = (0, 0)
    uid: int = 0
    gid: int = 0


def directory(path: str, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | permissions)


def file(path: str, data: bytes, permissions: int = 0o644, mtime: int = 0) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | permissions, data, mtime)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A character device node."""
    return Entry(path, stat.S_IFCHR | permissions, device=(major, minor))


def pack(entries: Iterable[Entry]) -> bytes:
    """The archive of the entries in their order. Parents that are not among them are put in before their children.

    The length is a multiple of four, so that archives can be concatenated. Raises ConfigError for a path that is empty,
    absolute, climbs or comes twice, and for a file of 4 GiB or more.
    """
    out = bytearray()
    seen: set[str] = set()
    number = 0
    for entry in entries:
        _check(entry, seen)
        for parent in _missing_parents(entry.path, seen):
            number += 1
            _append(out, number, directory(parent))
        seen.add(entry.path)
        number += 1
        _append(out, number, entry)
    _append(out, 0, Entry(_TRAILER, 0))
    return bytes(out)


def tree(top: str | os.PathLike[str]) -> list[Entry]:
    """The entries of a directory of the host, sorted, owned by root, with their modification times."""
    entries: list[Entry] = []
    base = os.fspath(top)
    for where, directories, files in os.walk(base):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(where, name)
            inside = os.path.relpath(path, base).replace(os.sep, "/")
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                entries.append(symlink(inside, os.readlink(path)))
            elif stat.S_ISDIR(status.st_mode):
                entries.append(directory(inside, stat.S_IMODE(status.st_mode)))
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as source:
                    entries.append(
                        file(inside, source.read(), stat.S_IMODE(status.st_mode), max(0, int(status.st_mtime)))
                    )
    return entries


def _check(entry: Entry, seen: set[str]) -> None:
    parts = entry.path.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in entry.path:
        raise ConfigError("path", entry.path, "a plain relative path")
    if entry.path in seen:
        raise ConfigError("path", entry.path, "twice in one archive")
    if len(entry.data) > _FIELD_MAX:
        raise ConfigError("path", entry.path, "4 GiB or more do not fit into a cpio archive")


def _missing_parents(path: str, seen: set[str]) -> list[str]:
    missing: list[str] = []
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        parent = "/".join(parts[:depth])
        if parent not in seen:
            seen.add(parent)
            missing.append(parent)
    return missing


def _append(out: bytearray, number: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (number, entry.mode, entry.uid, entry.gid, links, entry.mtime, len(entry.data), 0, 0, major, minor)
    out += b"070701" + b"".join(b"%08X" % value for value in (*fields, len(name), 0))
    out += name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
