"""Files and directories between host and guest.

What comes from the guest is not trusted: `Receiver` creates regular files, directories and symbolic links below one
directory and nothing else. A path with ``..`` or an absolute one ends the transfer. It writes through no link: a
directory on the way must be a real one. Links are made after everything else, and only those that lead nowhere outside.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import ConfigError, ExecError
from . import protocol as wire
from .exchange import END_OF_STDIN, Exchange
from .operations import Collector, Operation, WriteOptions, accept, builtin, check_builtin, read_to

_MAX_PATH: Final = 4096
_MAX_LINKS: Final = 100_000  # held in memory until the end


def get_file(remote: wire.GuestPath, local: Path, max_size: int | None) -> Operation[None]:
    """Fetch one file; ``local`` is replaced only when all has come."""
    partial = local.with_name(f".{local.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with partial.open("xb") as output:
            info = yield from read_to(output.write, remote, 0, None, max_size)
        partial.chmod(info.mode & 0o777)
        partial.replace(local)
    finally:
        partial.unlink(missing_ok=True)


def put_file(local: Path, remote: wire.GuestPath, options: WriteOptions) -> Operation[None]:
    """Send one file, with its permissions unless others are given."""
    with local.open("rb") as source:
        yield options.request(remote, None)
        while data := source.read(wire.CHUNK):
            yield wire.frame(wire.DATA, data)
        yield wire.frame(wire.END)
        accept((yield None), remote)


def walk(root: Path) -> Iterator[tuple[bytes, BinaryIO | None, int]]:
    """The stream that ``tree-receive`` takes: for each file its record and, of a regular file, source and size."""
    status = root.stat()
    yield wire.pack_record(status.st_mode, 0, status.st_mtime_ns, b"."), None, 0
    pending = [(root, b"")]
    while pending:
        folder, below = pending.pop()
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            name = below + os.fsencode(entry.name)
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                target = os.fsencode(os.readlink(entry.path))
                yield wire.pack_record(status.st_mode, 0, status.st_mtime_ns, name, target), None, 0
            elif stat.S_ISDIR(status.st_mode):
                yield wire.pack_record(status.st_mode, 0, status.st_mtime_ns, name), None, 0
                pending.append((Path(entry.path), name + b"/"))
            elif stat.S_ISREG(status.st_mode):
                with open(entry.path, "rb") as source:
                    size = os.fstat(source.fileno()).st_size
                    yield wire.pack_record(status.st_mode, size, status.st_mtime_ns, name), source, size
    yield wire.pack_record(0, 0, 0, b""), None, 0


def _tree_bytes(root: Path) -> Iterator[bytes]:
    """`walk` in chunks. A file that shrinks while it is read is filled up, one that grows is cut."""
    pending = bytearray()
    for record, source, size in walk(root):
        pending += record
        while source and size:
            data = source.read(min(size, wire.CHUNK)) or bytes(min(size, wire.CHUNK))
            size -= len(data)
            pending += data
            if len(pending) >= wire.CHUNK:
                yield bytes(pending)
                pending.clear()
        if len(pending) >= wire.CHUNK:
            yield bytes(pending)
            pending.clear()
    yield bytes(pending)


def put_tree(local: Path, remote: wire.GuestPath, uid: int, gid: int) -> Operation[None]:
    """Send a directory with all that is in it; what is there already stays unless it has the same name."""
    exchange = Exchange("tree-receive")
    collector = Collector(exchange, wire.MAX_PAYLOAD)
    yield builtin("tree-receive", remote, str(uid), str(gid), stdin=wire.STDIO_STREAM).encode()
    for chunk in _tree_bytes(local):
        data = memoryview(chunk)
        while data and not exchange.stdin_closed:
            piece, size = exchange.stdin_frame(data)
            if size:
                yield piece
                data = data[size:]
            else:
                exchange.handle((yield None))
                collector.collect()
        if exchange.stdin_closed:
            break
    if not exchange.over:
        yield END_OF_STDIN
    while not exchange.over:
        exchange.handle((yield None))
        collector.collect()
    check_builtin(exchange, collector.text(wire.STREAM_STDERR), remote)


def get_tree(remote: wire.GuestPath, local: Path, max_size: int | None) -> Operation[list[str]]:
    """Fetch a directory with all that is in it. Returns the symbolic links that were left out."""
    exchange = Exchange("tree-send")
    receiver = Receiver(local, max_size)
    failed = b""
    try:
        yield builtin("tree-send", remote).encode()
        while not exchange.over:
            exchange.handle((yield None))
            grants = b""
            for stream in (wire.STREAM_STDOUT, wire.STREAM_STDERR):
                while exchange.streams[stream].held:
                    data, grant = exchange.take(stream, wire.MAX_PAYLOAD)
                    grants += grant
                    if stream == wire.STREAM_STDOUT:
                        receiver.feed(data)
                    else:
                        failed = (failed + data)[:_MAX_PATH]
            if grants and not exchange.over:
                yield grants
        check_builtin(exchange, failed, remote)
        return receiver.finish()
    finally:
        receiver.close()


def link_stays_inside(name: str, target: str) -> bool:
    """Whether a link at ``name`` below the root leads nowhere outside it.

    Only leading ``..`` are allowed, no more than there are real directories above the link: behind another link a
    ``..`` would lead somewhere else than it seems to.
    """
    if not target or target.startswith("/"):
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    return ".." not in parts[ups:] and ups <= name.count("/")


class Receiver:
    """Writes a tree that comes from the guest below ``root``. See the head of this file for what it refuses."""

    def __init__(self, root: Path, max_size: int | None) -> None:
        self._root = root
        self._left = max_size
        self._max_size = max_size
        self._buffer = bytearray()
        self._directories: set[str] = {""}
        self._links: list[tuple[str, str]] = []
        self._modes: list[tuple[Path, int]] = []
        self._file: BinaryIO | None = None
        self._file_left = 0
        self._finished = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises ExecError for a stream that is malformed, hostile or too long."""
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                raise ExecError(f"the guest sent more than the {self._max_size} bytes allowed")
        self._buffer += data
        while self._step():
            pass

    def _step(self) -> bool:
        if self._file:
            piece = self._buffer[: self._file_left]
            self._file.write(piece)
            del self._buffer[: len(piece)]
            self._file_left -= len(piece)
            if self._file_left:
                return False
            self._file.close()
            self._file = None
            return True
        record = self._record()
        if record is None:
            return False
        if self._finished:
            raise ExecError("the guest agent sent more than a tree")
        if record.type == "other":
            self._finished = True
        else:
            self._create(record)
        return True

    def _record(self) -> wire.FileInfo | None:
        """The next record, if it has come whole."""
        at = 32
        for _ in range(2):
            if len(self._buffer) < at + 4:
                return None
            size = int.from_bytes(self._buffer[at : at + 4], "little")
            if size > _MAX_PATH:
                raise ExecError("the guest agent sent a path that is too long")
            at += 4 + size + 1
        if len(self._buffer) < at:
            return None
        record = wire.FileInfo.take(wire.PayloadReader(bytes(self._buffer[:at])))
        del self._buffer[:at]
        return record

    def _path(self, name: str) -> Path:
        """Where ``name`` goes. Raises ExecError unless it is a plain name in a real directory below the root."""
        parts = name.split("/")
        hostile = any(part in ("", ".", "..") for part in parts)
        if os.name == "nt":
            hostile = hostile or any(char in name for char in '\\:*?"<>|') or any(p[-1:] in " ." for p in parts)
        if hostile or "\0" in name:
            raise ExecError(f"the guest sent the file name {wire.plain(name.encode('utf-8', 'replace'))!r}")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if above not in self._directories:
                raise ExecError(f"the guest sent a file in {above!r}, which is no directory of the tree")
        return self._root / name

    def _create(self, record: wire.FileInfo) -> None:
        if record.name == ".":
            if not record.is_dir:
                raise ExecError("the guest agent sent a tree without a root")
            self._root.mkdir(exist_ok=True)
            return
        path = self._path(record.name)
        if record.is_symlink:
            if len(self._links) == _MAX_LINKS:
                raise ExecError(f"more than {_MAX_LINKS} symbolic links")
            self._links.append((record.name, record.target))
        elif record.is_dir:
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise ExecError(f"{path}: in the way of a directory from the guest")
            path.mkdir(exist_ok=True)
            self._directories.add(record.name)
            self._modes.append((path, record.mode & 0o777))
        else:
            if path.is_symlink() or path.exists():
                path.unlink()  # not written through: it may be a link or have other names
            self._file = path.open("xb")
            self._file_left = record.size
            # Ownership, set-uid bits and the like are the guest's affair.
            path.chmod(record.mode & 0o777 | 0o200)
            self._modes.append((path, record.mode & 0o777))

    def finish(self) -> list[str]:
        """Make the links. Returns those that were left out because they lead outside or could not be made."""
        if not self._finished or self._file or self._buffer:
            raise ExecError("the guest agent sent an incomplete tree")
        left_out = []
        for name, target in self._links:
            path = self._root / name
            if not link_stays_inside(name, target) or (path.is_dir() and not path.is_symlink()):
                left_out.append(name)
                continue
            path.unlink(missing_ok=True)
            try:
                path.symlink_to(target)
            except OSError:  # a host, or a user, that may not make links
                left_out.append(name)
        for path, mode in reversed(self._modes):
            path.chmod(mode)
        return left_out

    def close(self) -> None:
        """Let go of a file that has not come whole."""
        if self._file:
            self._file.close()


def local_path(value: str | os.PathLike[str]) -> Path:
    """A path of the host. Raises ConfigError for an empty one."""
    if not os.fspath(value):
        raise ConfigError("host path", repr(value), "it is empty")
    return Path(value)
