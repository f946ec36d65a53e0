"""Requests as generators, without input or output: the sync and the async client drive the same ones.

An operation yields bytes to be sent, or None for the next frame from the guest, which it is then sent. Its value is the
result. When the time is over the driver throws TimeoutError into it. Whatever it raises, the driver drops the
connection, which ends what the guest was doing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Final, TypeAlias, TypeVar

from ..errors import CommandFailed, ExecError, ExecTimeout
from . import protocol as wire
from .exchange import END_OF_STDIN, Exchange, file_error

T = TypeVar("T")
Operation: TypeAlias = Generator[bytes | None, wire.Frame, T]

DEFAULT_MAX_OUTPUT: Final = 64 << 20
DEFAULT_MAX_FILE: Final = 256 << 20
MAX_ENTRIES: Final = 1_000_000  # of a listing: a guest could list for ever

_SHUTDOWN: Final = struct.Struct("<IQ")
_WRITE: Final = struct.Struct("<IIIIQ")


@dataclass(frozen=True, slots=True)
class Result:
    """A command that has ended. ``returncode`` as in ``subprocess``; times in seconds, memory in KiB."""

    args: list[str]
    returncode: int
    stdout: bytes
    stderr: bytes
    duration_s: float
    user_s: float
    system_s: float
    maxrss_kib: int

    @property
    def stdout_text(self) -> str:
        """Standard output as text; what is not UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def stderr_text(self) -> str:
        """Standard error as text; what is not UTF-8 is replaced."""
        return self.stderr.decode("utf-8", "replace")

    def check(self) -> Result:
        """Itself. Raises CommandFailed when the command did not succeed."""
        if self.returncode == 0:
            return self
        how = f"exited with code {self.returncode}" if self.returncode > 0 else f"ended by signal {-self.returncode}"
        raise CommandFailed(f"{self.args[0]} {how}", self.returncode, self.stdout, self.stderr)


class Collector:
    """Collects what a command writes, up to a cap for each stream."""

    def __init__(self, exchange: Exchange, max_output: int) -> None:
        self.exchange = exchange
        self.max_output = max_output
        self.output: dict[int, list[bytes]] = {wire.STREAM_STDOUT: [], wire.STREAM_STDERR: []}
        self._sizes = {wire.STREAM_STDOUT: 0, wire.STREAM_STDERR: 0}

    def collect(self) -> bytes:
        """Take what is there; returns the grants to be sent. Raises ExecError beyond the cap."""
        grants = b""
        for stream, pieces in self.output.items():
            while self.exchange.streams[stream].held:
                data, grant = self.exchange.take(stream, wire.MAX_PAYLOAD)
                grants += grant
                pieces.append(data)
                self._sizes[stream] += len(data)
            if self._sizes[stream] > self.max_output:
                raise ExecError(f"{self.exchange.argv0} wrote more than the {self.max_output} bytes allowed")
        return b"" if self.exchange.over else grants

    def text(self, stream: int) -> bytes:
        """All of one stream."""
        return b"".join(self.output[stream])

    def timeout(self, seconds: float | None) -> ExecTimeout:
        """The error that says the command took too long, with what it wrote."""
        within = "in time" if seconds is None else f"within {seconds:g} s"
        message = f"{self.exchange.argv0} did not end {within}"
        return ExecTimeout(message, self.text(wire.STREAM_STDOUT), self.text(wire.STREAM_STDERR))

    def result(self, args: list[str]) -> Result:
        """The result, once the exchange is over. Raises what kept the command from starting."""
        if self.exchange.failure:
            raise self.exchange.failure
        end = self.exchange.exit
        assert end is not None
        stdout, stderr = self.text(wire.STREAM_STDOUT), self.text(wire.STREAM_STDERR)
        return Result(args, end.returncode, stdout, stderr, end.duration_s, end.user_s, end.system_s, end.maxrss_kib)


def command_words(request: wire.ExecRequest) -> list[str]:
    """The command for messages and results."""
    return [word if isinstance(word, str) else word.decode("utf-8", "replace") for word in request.argv]


def run(
    request: wire.ExecRequest, stdin: bytes | memoryview | None, timeout: float | None, max_output: int
) -> Operation[Result]:
    """Run a command to its end with ``stdin`` for input."""
    first = request.encode()
    args = command_words(request)
    exchange = Exchange(args[0], request.window)
    collector = Collector(exchange, max_output)
    data = memoryview(stdin or b"")
    piece, size = exchange.stdin_frame(data)
    data = data[size:]
    first += piece
    ended = request.stdin == wire.STDIO_NULL
    if not ended and not data:
        first += END_OF_STDIN
        ended = True
    try:
        yield first
        while not exchange.over:
            exchange.handle((yield None))
            pieces = [collector.collect()]
            while not exchange.stdin_closed and data:
                piece, size = exchange.stdin_frame(data)
                if not size:
                    break
                pieces.append(piece)
                data = data[size:]
            if not ended and not data and not exchange.stdin_closed:
                pieces.append(END_OF_STDIN)
                ended = True
            if any(pieces):
                yield b"".join(pieces)
    except TimeoutError:
        collector.collect()
        raise collector.timeout(timeout) from None
    if exchange.exit and exchange.exit.timed_out:
        raise collector.timeout(timeout)
    return collector.result(args)


def simple(kind: int, payload: bytes, path: wire.GuestPath | None = None) -> Operation[bytes]:
    """A request with one answer, whose payload it returns."""
    yield wire.request(kind, payload)
    frame = yield None
    return accept(frame, path)


def accept(frame: wire.Frame, path: wire.GuestPath | None) -> bytes:
    """The payload of OK. Raises what ERROR says."""
    if frame.type == wire.OK:
        return frame.payload
    if frame.type != wire.ERROR:
        raise ExecError(f"the guest agent sent an unexpected frame of type {frame.type:#x}")
    code, stage, text = wire.refusal(frame.payload)
    if path is not None:
        raise file_error(code, text, path)
    raise ExecError(f"the guest refused: {stage}: {text}", code)


def set_clock(time_ns: int) -> Operation[bytes]:
    """Set the guest's clock."""
    return simple(wire.CLOCK_SET, struct.pack("<Q", time_ns))


def renew(time_ns: int, host_name: str, machine_id: str) -> Operation[bytes]:
    """Make the guest another machine than the one it is a copy of. ``time_ns`` 0 leaves its clock alone."""
    names = wire.path_string(host_name) + wire.path_string(machine_id)
    return simple(wire.RENEW, struct.pack("<Q", time_ns) + names + wire.random_seed())


def shutdown(restart: bool, grace_s: float) -> Operation[bytes]:
    """End the machine in good order."""
    return simple(wire.SHUTDOWN, _SHUTDOWN.pack(1 if restart else 0, int(grace_s * 1e9)))


def stat(path: wire.GuestPath, follow: bool) -> Operation[wire.FileInfo]:
    """What a file is."""
    payload = struct.pack("<I", 0 if follow else wire.PATH_NOFOLLOW) + wire.path_string(path)
    answer = yield from simple(wire.STAT, payload, path)
    return wire.FileInfo.take(wire.PayloadReader(answer))


def list_directory(path: wire.GuestPath) -> Operation[list[wire.FileInfo]]:
    """The files of a directory, by name."""
    yield from simple(wire.LIST, wire.path_string(path), path)
    found: list[wire.FileInfo] = []
    while (frame := (yield None)).type == wire.DATA:
        found.extend(wire.records(frame.payload))
        if len(found) > MAX_ENTRIES:
            raise ExecError(f"{wire.show_path(path)}: more than {MAX_ENTRIES} files")
    if frame.type != wire.END:
        accept(frame, path)
    return sorted(found, key=lambda entry: entry.raw_name)


def read_to(
    write: Callable[[bytes], object], path: wire.GuestPath, offset: int, limit: int | None, max_size: int | None
) -> Operation[wire.FileInfo]:
    """Read a file piece by piece. Raises ExecError when it is longer than ``max_size``."""
    bounds = struct.pack("<QQ", offset, wire.UNKNOWN_SIZE if limit is None else limit)
    answer = yield from simple(wire.FILE_READ, bounds + wire.path_string(path), path)
    size = 0
    while (frame := (yield None)).type == wire.DATA:
        size += len(frame.payload)
        if max_size is not None and size > max_size:
            raise ExecError(f"{wire.show_path(path)}: longer than the {max_size} bytes allowed")
        write(frame.payload)
    if frame.type != wire.END:
        accept(frame, path)
    return wire.FileInfo.take(wire.PayloadReader(answer))


def read_file(path: wire.GuestPath, offset: int, limit: int | None, max_size: int) -> Operation[bytes]:
    """The contents of a file, ``limit`` bytes of it at most."""
    pieces: list[bytes] = []
    yield from read_to(pieces.append, path, offset, limit, max_size)
    return b"".join(pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How a file is written. ``mode``, ``uid``, ``gid`` None: as the file has them, else 0644 and root."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    append: bool = False
    exclusive: bool = False
    parents: bool = False
    in_place: bool = False

    def request(self, path: wire.GuestPath, size: int | None) -> bytes:
        """The request that begins the write."""
        flags = (
            (wire.WRITE_APPEND if self.append else 0)
            | (wire.WRITE_EXCLUSIVE if self.exclusive else 0)
            | (wire.WRITE_PARENTS if self.parents else 0)
            | (wire.WRITE_IN_PLACE if self.in_place else 0)
        )
        attributes = [wire.KEEP if value is None else value for value in (self.mode, self.uid, self.gid)]
        head = _WRITE.pack(flags, *attributes, wire.UNKNOWN_SIZE if size is None else size)
        return wire.request(wire.FILE_WRITE, head + wire.path_string(path))


def write_file(path: wire.GuestPath, data: bytes | memoryview, options: WriteOptions) -> Operation[None]:
    """Write a file."""
    view = memoryview(data).cast("B") if data else memoryview(b"")
    first = options.request(path, len(view))
    for at in range(0, max(len(view), 1), wire.CHUNK):
        piece = wire.frame(wire.DATA, bytes(view[at : at + wire.CHUNK])) if view else b""
        last = at + wire.CHUNK >= len(view)
        yield first + piece + (wire.frame(wire.END) if last else b"")
        first = b""
    accept((yield None), path)


def mkdir(path: wire.GuestPath, mode: int | None, parents: bool) -> Operation[bytes]:
    """Make a directory."""
    head = struct.pack("<II", wire.PATH_PARENTS if parents else 0, wire.KEEP if mode is None else mode)
    return simple(wire.MKDIR, head + wire.path_string(path), path)


def remove(path: wire.GuestPath, missing_ok: bool) -> Operation[bytes]:
    """Remove a file or an empty directory."""
    head = struct.pack("<I", wire.PATH_MISSING_OK if missing_ok else 0)
    return simple(wire.REMOVE, head + wire.path_string(path), path)


def two_paths(kind: int, first: wire.GuestPath, second: wire.GuestPath) -> Operation[bytes]:
    """RENAME and SYMLINK."""
    return simple(kind, wire.path_string(first) + wire.path_string(second), second)


def set_attributes(path: wire.GuestPath, mode: int | None, uid: int | None, gid: int | None) -> Operation[bytes]:
    """chmod and chown."""
    values = [wire.KEEP if value is None else value for value in (mode, uid, gid)]
    return simple(wire.SET_ATTR, struct.pack("<III", *values) + wire.path_string(path), path)


def builtin(name: str, path: wire.GuestPath, *words: str, stdin: int = wire.STDIO_NULL) -> wire.ExecRequest:
    """A request for one of the agent's own commands."""
    wire.path_string(path)
    text = wire.show_path(path)
    return wire.ExecRequest(argv=[name, text, *words], stdin=stdin, flags=wire.EXEC_BUILTIN)


def check_builtin(exchange: Exchange, failed: bytes, path: wire.GuestPath) -> None:
    """Raise what a builtin reports: the errno as its exit code, the file on its standard error."""
    if exchange.failure:
        raise exchange.failure
    assert exchange.exit is not None
    code = exchange.exit.returncode
    if code == 0:
        return
    if code < 0:
        raise ExecError(f"{wire.show_path(path)}: the guest ended the transfer by signal {-code}")
    name = wire.plain(failed, 300)
    reason = _REASONS.get(code, f"guest error {code}")
    raise file_error(code, f"{reason} ({name})" if name else reason, path)


_REASONS: Final = {
    2: "no such file or directory",
    13: "permission denied",
    17: "file exists",
    20: "not a directory",
    21: "is a directory",
    22: "invalid argument",
    28: "no space left on device",
    30: "read-only file system",
    36: "file name too long",
    39: "directory not empty",
    40: "too many levels",
}


def remove_tree(path: wire.GuestPath, missing_ok: bool) -> Operation[None]:
    """Remove a directory with all that is in it, or a file."""
    exchange = Exchange("tree-remove")
    collector = Collector(exchange, wire.MAX_PAYLOAD)
    yield builtin("tree-remove", path).encode()
    while not exchange.over:
        exchange.handle((yield None))
        if grants := collector.collect():
            yield grants
    if missing_ok and exchange.exit and exchange.exit.returncode == 2:
        return
    check_builtin(exchange, collector.text(wire.STREAM_STDERR), path)
