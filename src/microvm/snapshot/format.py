"""The file a snapshot is.

    0           `HEADER`, authenticated
    4096        a description in JSON, then a table of the pages that are in the file (`ranges.pack`), authenticated
    aligned     guest memory as one sparse image, every page at its own offset, so that it can be mapped as it is

A difference snapshot has the same image with only the pages that changed since its parent, which it names by id and by
file name; the table tells a page that became zero from one that is the parent's.

The authentication code covers header, description and table. They hold the digest of the memory, which is checked when
the file is not as it was written (its modification time is in the header): reading all of it each time would cost what
mapping it saves. A file is written under another name, made durable and renamed, so a name holds a whole snapshot, or
what it held before.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from .._os.mapping import PAGE_SIZE, can_map_over, map_over, map_private
from ..errors import HostError, SnapshotError
from . import codec, key, ranges
from .ranges import Ranges

MAGIC: Final = b"\x89MVMSNAP"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQQQQQ16s32s")
"""Magic, version, 0, then in bytes: file, description, table; offset and size of memory; time of writing in nanoseconds
since 1970; id; authentication code, computed with zeroes in its place."""

BODY: Final = 4096
MAX_DESCRIPTION: Final = 64 << 20
MAX_TABLE: Final = 256 << 20
MAX_CHAIN: Final = 64
"""Differences on differences: each costs a file, and a mapping for each piece of memory."""

_ALIGN: Final = 64 << 10
_CHUNK: Final = 2 << 20
_ZERO: Final = bytes(PAGE_SIZE)
_NO_MAC: Final = bytes(32)
_MAP_PAGES: Final = 16  # from so many pages on a piece of a difference is mapped, not read
_MAX_PIECES: Final = 8192


@dataclass(frozen=True, slots=True)
class Header:
    """`HEADER`, checked."""

    file_size: int
    description_size: int
    table_size: int
    memory_offset: int
    memory_size: int
    written_ns: int
    id: str

    @classmethod
    def parse(cls, data: bytes, actual_size: int, name: str) -> Header:
        """Raises SnapshotError with one sentence that names the file."""
        if len(data) < 16 or data[:8] != MAGIC:
            raise SnapshotError(f"{name} is not a snapshot")
        version = int.from_bytes(data[8:12], "little")
        if version != VERSION:
            how = "a newer" if version > VERSION else "another"
            raise SnapshotError(
                f"{name} was saved by {how} version of microvm (format {version}, this reads {VERSION})"
            )
        if len(data) < HEADER.size:
            raise SnapshotError(f"{name} is truncated")
        _, _, _, size, description, table, memory_at, memory, written, identity, _ = HEADER.unpack_from(data)
        header = cls(size, description, table, memory_at, memory, written, identity.hex())
        if actual_size < size:
            raise SnapshotError(f"{name} is truncated")
        if (
            actual_size != size
            or not 0 < description <= MAX_DESCRIPTION
            or table > MAX_TABLE
            or memory_at % PAGE_SIZE
            or memory % PAGE_SIZE
            or memory_at < BODY + description + table
            or memory_at + memory != size
        ):
            raise SnapshotError(f"{name} is damaged")
        return header


class Snapshot:
    """An open snapshot file. Close it when the memory is mapped; a difference keeps its parents open as long."""

    def __init__(self, path: Path, fd: int, header: Header, description: dict[str, Any], own: Ranges) -> None:
        self.path = path
        self.header = header
        self.description = description
        self.own = own
        self.parent: Snapshot | None = None
        self._fd = fd

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, secret: bytes | None = None, verify: bool = False) -> Self:
        """Open and check a snapshot and those it builds on.

        ``verify`` reads all memory and compares it with its digest, which otherwise is done only when the file was
        touched. An empty ``secret`` believes what anybody wrote. Raises SnapshotError with one sentence, HostError if a
        file cannot be read.
        """
        secret = key.load() if secret is None else secret
        first = snapshot = cls._open_one(Path(path), secret)
        try:
            depth = 1
            while True:
                snapshot._check_memory(verify)
                above = snapshot.description.get("parent")
                if above is None:
                    return first
                depth += 1
                if depth > MAX_CHAIN:
                    raise SnapshotError(f"{path} builds on more than {MAX_CHAIN} others")
                parent = snapshot._open_parent(above, secret)
                snapshot.parent = parent
                snapshot = parent
        except BaseException:
            first.close()
            raise

    @classmethod
    def _open_one(cls, path: Path, secret: bytes) -> Self:
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            raise SnapshotError(f"there is no snapshot {path}") from None
        except OSError as error:
            raise HostError("open", error.errno or 0, f"snapshot {path}: {(error.strerror or '').lower()}") from error
        try:
            with open(fd, "rb", closefd=False, buffering=0) as file:
                head = file.read(HEADER.size)
                header = Header.parse(head, os.fstat(fd).st_size, str(path))
                file.seek(BODY)
                body = _read(file.read, header.description_size + header.table_size)
            if len(body) != header.description_size + header.table_size:
                raise SnapshotError(f"{path} is truncated")
            if secret and not hmac.compare_digest(_mac(secret, head, body), head[-32:]):
                raise SnapshotError(f"{path} is damaged, or was not saved by this user on this machine")
            description = codec.decode(body[: header.description_size])
            if not isinstance(description, dict):
                raise SnapshotError(f"{path} is damaged")
            own = ranges.unpack(body[header.description_size :], header.memory_size // PAGE_SIZE)
            return cls(path, fd, header, description, own)
        except OSError as error:
            os.close(fd)
            raise HostError("read", error.errno or 0, f"snapshot {path}: {(error.strerror or '').lower()}") from error
        except BaseException:
            os.close(fd)
            raise

    def _open_parent(self, above: Any, secret: bytes) -> Self:
        damaged = SnapshotError(f"{self.path} is damaged")
        if not isinstance(above, dict):
            raise damaged
        name, identity = above.get("file"), above.get("id")
        if not isinstance(name, str) or not isinstance(identity, str):
            raise damaged
        path = self.path.parent / name
        try:
            parent = self._open_one(path, secret)
        except SnapshotError as error:
            raise SnapshotError(f"{self.path} builds on another snapshot: {error}") from None
        if parent.header.id != identity or parent.header.memory_size != self.header.memory_size:
            parent.close()
            raise SnapshotError(f"{self.path} builds on another snapshot than the one that now is {path}")
        return parent

    @property
    def id(self) -> str:
        """32 hexadecimal digits, different for every snapshot ever made."""
        return self.header.id

    @property
    def pages(self) -> Ranges:
        """Pages that this snapshot or one it builds on has; all others are zero."""
        chain: list[Ranges] = []
        snapshot: Snapshot | None = self
        while snapshot is not None:
            chain.append(snapshot.own)
            snapshot = snapshot.parent
        return ranges.merge(*chain)

    def map(self) -> mmap.mmap:
        """The memory, private to the caller: nothing is read before it is used. Raises HostError."""
        chain: list[Snapshot] = []
        snapshot: Snapshot | None = self
        while snapshot is not None:
            chain.append(snapshot)
            snapshot = snapshot.parent
        base = chain.pop()
        try:
            mapping = map_private(base._fd, base.header.memory_offset, base.header.memory_size)
            if chain:
                base._overlay(mapping, list(reversed(chain)))
        except OSError as error:
            raise HostError("mmap", error.errno or 0, f"snapshot {self.path}: {error.strerror}") from error
        return mapping

    @staticmethod
    def _overlay(mapping: mmap.mmap, chain: list[Snapshot]) -> None:
        import ctypes

        hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        pieces = 0
        with memoryview(mapping) as view:
            for snapshot in chain:
                for first, count in snapshot.own:
                    at, size = first * PAGE_SIZE, count * PAGE_SIZE
                    offset = snapshot.header.memory_offset + at
                    if count >= _MAP_PAGES and pieces < _MAX_PIECES and can_map_over():
                        pieces += 1
                        if map_over(hva + at, size, snapshot._fd, offset):
                            continue
                    snapshot._read_into(view[at : at + size], offset)

    def _read_into(self, view: memoryview, offset: int) -> None:
        with open(self._fd, "rb", closefd=False, buffering=0) as file:
            file.seek(offset)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(0, "the file became shorter")
                done += count

    def _check_memory(self, verify: bool) -> None:
        if not verify and os.fstat(self._fd).st_mtime_ns == self.header.written_ns:
            return
        digest = hashlib.blake2b(digest_size=32)
        buffer = memoryview(bytearray(_CHUNK))
        for at, size in _chunks(self.own):
            self._read_into(buffer[:size], self.header.memory_offset + at)
            digest.update(buffer[:size])
        if digest.hexdigest() != self.description.get("memory") or not self._rest_is_zero(buffer):
            raise SnapshotError(f"the memory in {self.path} is damaged")

    def _rest_is_zero(self, buffer: memoryview) -> bool:
        """Whether pages that are not in the table have nothing in the file, of which a whole snapshot maps them all."""
        if self.description.get("parent") is not None:
            return True
        at = 0
        for first, count in [*self.own, (self.header.memory_size // PAGE_SIZE, 0)]:
            for start, size in _chunks([(at, first - at)]):
                piece = buffer[:size]
                self._read_into(piece, self.header.memory_offset + start)
                if bytes(piece).count(0) != size:
                    return False
            at = first + count
        return True

    def close(self) -> None:
        """Free the descriptors. Memory that was mapped stays. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self.parent is not None:
            self.parent.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Parent:
    """What a difference builds on: the ``id`` and ``path`` of a snapshot."""

    id: str
    path: Path


def write(
    path: str | os.PathLike[str],
    description: dict[str, Any],
    memory: memoryview,
    pages: Ranges,
    *,
    parent: Parent | None = None,
    secret: bytes | None = None,
    durable: bool = True,
    identity: str | None = None,
    step: Callable[[str], None] | None = None,
) -> str:
    """Write a snapshot with these pages of ``memory`` and return its id.

    Without ``parent`` pages that are all zero are left out. ``identity`` is for one that replaces another. ``step`` is
    told of each stage, for tests that end the process there. Without ``durable`` a power failure may leave a file that
    `Snapshot.open` refuses. Raises HostError; then ``path`` is as it was.
    """
    secret = key.load() if secret is None else secret
    path = Path(path)
    number = os.urandom(16) if identity is None else bytes.fromhex(identity)
    temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    tell = step or (lambda _: None)
    try:
        fd = os.open(temporary, flags, 0o600)
        try:
            tell("created")
            with open(fd, "r+b", closefd=False, buffering=0) as file:
                # The description's size must be known before memory has a place: the digest's is, its value is not.
                full = {**description, "memory": "0" * 64, "parent": _parent(parent, path)}
                present = pages if parent is not None else _present(memory, pages)
                table = ranges.pack(present)
                size = len(codec.encode(full))
                if size > MAX_DESCRIPTION or len(table) > MAX_TABLE:
                    raise SnapshotError("there is more state than a snapshot can hold")
                memory_at = -(-(BODY + size + len(table)) // _ALIGN) * _ALIGN
                file.truncate(memory_at + len(memory))
                full["memory"] = _write_memory(file, memory_at, memory, present, tell)
                written_ns = time.time_ns() // 1000 * 1000
                fields = (memory_at + len(memory), size, len(table), memory_at, len(memory), written_ns, number)
                head = HEADER.pack(MAGIC, VERSION, 0, *fields, _NO_MAC)
                body = codec.encode(full) + table
                file.seek(BODY)
                _write_all(file.write, body)
                tell("described")
                file.seek(0)
                _write_all(file.write, head[:-32] + _mac(secret, head, body))
                tell("headed")
            os.utime(fd if os.utime in os.supports_fd else temporary, ns=(written_ns, written_ns))
            if durable:
                os.fsync(fd)
            tell("durable")
        finally:
            os.close(fd)
        os.replace(temporary, path)
        tell("renamed")
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        raise HostError(
            "write", error.errno or 0, f"snapshot {path}: {(error.strerror or str(error)).lower()}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return number.hex()


def _parent(parent: Parent | None, path: Path) -> dict[str, str] | None:
    if parent is None:
        return None
    try:
        name = os.path.relpath(parent.path.absolute(), path.parent.absolute())
    except ValueError:  # another drive
        name = str(parent.path.absolute())
    return {"file": name, "id": parent.id}


def _mac(secret: bytes, head: bytes, body: bytes) -> bytes:
    code = hmac.new(secret, head[:-32] + _NO_MAC, "sha256")
    code.update(body)
    return code.digest()


def _chunks(pages: Ranges) -> list[tuple[int, int]]:
    """Offset and size of pieces no longer than `_CHUNK`."""
    return [
        (at, min(_CHUNK, (first + count) * PAGE_SIZE - at))
        for first, count in pages
        for at in range(first * PAGE_SIZE, (first + count) * PAGE_SIZE, _CHUNK)
    ]


def _present(memory: memoryview, pages: Ranges) -> Ranges:
    found: Ranges = []
    for at, size in _chunks(pages):
        piece = bytes(memory[at : at + size])
        for offset in range(0, size, PAGE_SIZE):
            if piece[offset : offset + PAGE_SIZE] != _ZERO:
                found.append(((at + offset) // PAGE_SIZE, 1))
    return ranges.merge(found)


def _write_memory(file: Any, memory_at: int, memory: memoryview, pages: Ranges, tell: Callable[[str], None]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for at, size in _chunks(pages):
        piece = bytes(memory[at : at + size])  # once: what is hashed is what is written
        digest.update(piece)
        start = 0  # of the run of pages that are not zero
        for offset in range(0, size + 1, PAGE_SIZE):
            if offset == size or piece[offset : offset + PAGE_SIZE] == _ZERO:
                if offset > start:
                    file.seek(memory_at + at + start)
                    _write_all(file.write, piece[start:offset])
                start = offset + PAGE_SIZE
        tell("memory")
    return digest.hexdigest()


def _read(read: Callable[[int], bytes | None], size: int) -> bytes:
    parts = []
    while size > 0 and (part := read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_all(write_: Callable[[bytes], int | None], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[write_(bytes(view) if len(view) < len(data) else data) or 0 :]


def _sync_directory(path: Path) -> None:
    with contextlib.suppress(OSError):  # Windows has no directory handles
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
