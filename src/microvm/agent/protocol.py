"""The protocol between the host and the guest agent, version 1.

The agent listens on a vsock port (1024). The host opens a connection for each operation that runs at the same time and
may use it again when the operation is over. At boot the agent itself connects to the same port of the host (CID 2) and
says READY; that connection, too, can then be used for requests.

A frame is little-endian: ``u32`` payload length, ``u8`` type, ``u24`` argument, payload. A string is ``u32`` length,
the bytes, a NUL that the length does not count; no NUL inside. Requests are at most 1 MiB, every other payload at most
64 KiB, in both directions. The argument of a request is the protocol version; of a stream frame, the stream.

==========  ===============================================================================================
request     payload -> answer
==========  ===============================================================================================
EXEC        see `ExecRequest` -> [STARTED], DATA and END of streams 1 and 2, WINDOW of stream 0, EXIT
PING        anything -> OK with the same
INFO        -> OK, see `GuestInfo`
CLOCK_SET   u64 ns since 1970 -> OK
RESEED      up to 512 random bytes -> OK
SYNC        -> OK when everything is on the disks
FREEZE      -> OK when the disk that takes the writes is consistent and still; THAW ends that
SHUTDOWN    u32 0 off or 1 restart, u64 ns between SIGTERM and SIGKILL -> OK, then the machine ends
RENEW       u64 ns since 1970 or 0, string host name, string machine id, up to 512 random bytes -> OK; for copies
FILE_READ   u64 offset, u64 limit, path -> OK with a record, DATA*, END
FILE_WRITE  u32 flags, u32 mode, u32 uid, u32 gid, u64 size, path; DATA*, END -> OK after the END
STAT        u32 flags, path -> OK with a record
LIST        path -> OK, DATA* with whole records, END
MKDIR       u32 flags, u32 mode, path -> OK
REMOVE      u32 flags, path -> OK
RENAME      from, to -> OK
SYMLINK     target, path -> OK
SET_ATTR    u32 mode, u32 uid, u32 gid, path -> OK
==========  ===============================================================================================

Any request may be answered by ERROR: u32 errno, string stage, string text. A mode, uid, gid or size of all ones means
"as it is" or "unknown". A record is u32 mode, uid, gid, links; u64 size; i64 mtime in ns; string name; string target of
a symbolic link.

While a command runs the host sends DATA and END of stream 0, WINDOW of streams 1 and 2 (u32: so many bytes more),
SIGNAL (u32, to the process group) and RESIZE (u16 rows, u16 columns). Neither side sends more of a stream than the
other has granted: 64 KiB of stdin and what EXEC says of the others to begin with. So no stream holds up another. A
connection that the host closes ends the command with everything it started. EXIT comes after all output; it is i32
code (negative: the signal), u32 flags, u32 pid, u32 0, u64 wall ns, user us, system us, maximum resident KiB.

Trees are streamed by builtin commands (EXEC with its flag): ``tree-send PATH`` writes, ``tree-receive PATH UID GID``
reads, for each file, a record and the file's bytes; a record of mode 0 ends it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final, NamedTuple, TypeAlias

from ..errors import ConfigError, ExecError

VERSION: Final = 1
PORT: Final = 1024

MAX_REQUEST: Final = 1 << 20
MAX_PAYLOAD: Final = 64 << 10  # of every frame that is no request: a guest cannot make us hold more
CHUNK: Final = 60 << 10  # what is sent in one DATA frame: with its header it fits a 64 KiB vsock packet
STDIN_WINDOW: Final = 64 << 10
OUTPUT_WINDOW: Final = 256 << 10
KEEP: Final = 0xFFFF_FFFF
UNKNOWN_SIZE: Final = 0xFFFF_FFFF_FFFF_FFFF

EXEC: Final = 0x01
PING: Final = 0x02
INFO: Final = 0x03
CLOCK_SET: Final = 0x04
RESEED: Final = 0x05
SYNC: Final = 0x06
FREEZE: Final = 0x07
THAW: Final = 0x08
SHUTDOWN: Final = 0x09
RENEW: Final = 0x0A
FILE_READ: Final = 0x10
FILE_WRITE: Final = 0x11
STAT: Final = 0x12
LIST: Final = 0x13
MKDIR: Final = 0x14
REMOVE: Final = 0x15
RENAME: Final = 0x16
SYMLINK: Final = 0x17
SET_ATTR: Final = 0x18

DATA: Final = 0x40
END: Final = 0x41
WINDOW: Final = 0x42
SIGNAL: Final = 0x43
RESIZE: Final = 0x44

OK: Final = 0x80
ERROR: Final = 0x81
STARTED: Final = 0x82
EXIT: Final = 0x83
READY: Final = 0x84

STREAM_STDIN: Final = 0
STREAM_STDOUT: Final = 1
STREAM_STDERR: Final = 2

EXEC_PTY: Final = 1
EXEC_ENV_REPLACE: Final = 2
EXEC_NO_NEW_PRIVS: Final = 4
EXEC_WANT_STARTED: Final = 8
EXEC_LEAVE: Final = 16
EXEC_BUILTIN: Final = 32

STDIO_NULL: Final = 0
STDIO_STREAM: Final = 1
STDIO_MERGE: Final = 2

EXIT_TIMED_OUT: Final = 1
EXIT_CORE: Final = 2

WRITE_IN_PLACE: Final = 1
WRITE_APPEND: Final = 2
WRITE_PARENTS: Final = 4
WRITE_EXCLUSIVE: Final = 8

PATH_NOFOLLOW: Final = 1
PATH_PARENTS: Final = 2
PATH_MISSING_OK: Final = 4

SIGKILL: Final = 9  # the guest's numbers; the host may be no Unix
SIGTERM: Final = 15

Text: TypeAlias = str | bytes
GuestPath: TypeAlias = str | bytes | PurePosixPath

_HEADER: Final = struct.Struct("<II")
_U32: Final = struct.Struct("<I")
_EXEC: Final = struct.Struct("<IBBBBHHQIIII")
_EXIT: Final = struct.Struct("<iIIIQQQQ")
_RECORD: Final = struct.Struct("<IIIIQq")
_INFO: Final = struct.Struct("<QQQQQIIII")
_READY: Final = struct.Struct("<IIQQ")
_LIMIT: Final = struct.Struct("<IQQ")


class Frame(NamedTuple):
    """One frame as it came: type, argument, payload."""

    type: int
    arg: int
    payload: bytes


def frame(kind: int, payload: bytes = b"", arg: int = 0) -> bytes:
    """One frame on the wire."""
    return _HEADER.pack(len(payload), kind | arg << 8) + payload


def request(kind: int, payload: bytes = b"") -> bytes:
    """A request on the wire. Raises ConfigError when it is longer than the agent takes."""
    if len(payload) > MAX_REQUEST:
        raise ConfigError("request", f"of {len(payload)} bytes", f"at most {MAX_REQUEST} (arguments and environment)")
    return frame(kind, payload, VERSION)


class FrameParser:
    """Cuts what arrives into frames. Bounded: a guest cannot make it hold more than one frame and one receive."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def empty(self) -> bool:
        """Whether nothing is left of what was fed."""
        return not self._buffer

    def feed(self, data: bytes) -> None:
        """Take what was received."""
        self._buffer += data

    def pop(self) -> Frame | None:
        """The next whole frame. Raises ExecError when the guest announces a longer one than is allowed."""
        buffer = self._buffer
        if len(buffer) < 8:
            return None
        length, tag = _HEADER.unpack_from(buffer)
        if length > MAX_PAYLOAD:
            raise ExecError(f"the guest agent sent a frame of {length} bytes, {MAX_PAYLOAD} are allowed")
        end = 8 + length
        if len(buffer) < end:
            return None
        found = Frame(tag & 0xFF, tag >> 8, bytes(memoryview(buffer)[8:end]))
        del buffer[:end]
        return found


def _encode(what: str, value: Text | PurePosixPath) -> bytes:
    if isinstance(value, PurePosixPath):
        value = str(value)
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogateescape")
    elif not isinstance(value, bytes):
        raise ConfigError(what, value, "text or bytes are needed")
    if b"\0" in value:
        raise ConfigError(what, repr(value), "no NUL can be in it")
    return value


def string(value: bytes) -> bytes:
    """A string on the wire."""
    return _U32.pack(len(value)) + value + b"\0"


def path_string(value: GuestPath) -> bytes:
    """A path on the wire. Raises ConfigError for an empty path or one with a NUL."""
    encoded = _encode("guest path", value)
    if not encoded:
        raise ConfigError("guest path", repr(value), "it is empty")
    return string(encoded)


def show_path(value: GuestPath) -> str:
    """A path for a message."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def plain(text: bytes, limit: int = 200) -> str:
    """Text from the guest, fit for a terminal: one line, no control characters, not endless."""
    shown = text[:limit].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in shown)


class PayloadReader:
    """Takes values off a payload from the guest. Raises ExecError where they do not fit."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._at = 0

    @property
    def at_end(self) -> bool:
        """Whether everything was taken."""
        return self._at == len(self._payload)

    def unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        """The fields of ``layout``."""
        if len(self._payload) - self._at < layout.size:
            raise ExecError("the guest agent sent a short answer")
        values = layout.unpack_from(self._payload, self._at)
        self._at += layout.size
        return values

    def string(self) -> bytes:
        """A string."""
        (size,) = self.unpack(_U32)
        end = self._at + size
        if end >= len(self._payload) or self._payload[end] != 0 or self._payload.find(b"\0", self._at, end) >= 0:
            raise ExecError("the guest agent sent a malformed string")
        value = self._payload[self._at : end]
        self._at = end + 1
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecRequest:
    """A command to run.

    ``timeout_ns`` 0 is none; ``pty`` is rows and columns; ``user`` is ``name[:group]`` or numbers.
    """

    argv: Sequence[Text]
    env: Mapping[str, str] | None = None
    cwd: GuestPath | None = None
    user: str | None = None
    stdin: int = STDIO_NULL
    stdout: int = STDIO_STREAM
    stderr: int = STDIO_STREAM
    pty: tuple[int, int] | None = None
    timeout_ns: int = 0
    window: int = OUTPUT_WINDOW
    flags: int = 0
    rlimits: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The request's frame. Raises ConfigError for what the agent could not take."""
        argv, environment = self.argv, self.env or {}
        if isinstance(argv, str | bytes) or not argv:
            raise ConfigError("command", repr(argv), 'a list is needed, such as ["ls", "-l"]')
        for name in environment:
            if not name or "=" in name:
                raise ConfigError("environment variable", repr(name), "the name is empty or has a = in it")
        rows, columns = self.pty or (0, 0)
        if not (0 <= rows <= 0xFFFF and 0 <= columns <= 0xFFFF):
            raise ConfigError("terminal size", f"{rows}x{columns}", "0 to 65535 rows and columns")
        flags = self.flags | (EXEC_PTY if self.pty else 0)
        counts = len(argv), len(environment), len(self.rlimits)
        if counts[2] > 32:
            raise ConfigError("rlimits", str(counts[2]), "at most 32")
        modes = self.stdin, self.stdout, self.stderr
        parts = [_EXEC.pack(flags, *modes, 0, rows, columns, self.timeout_ns, self.window, *counts)]
        parts.append(string(_encode("working directory", self.cwd or "")))
        parts.append(string(_encode("user", self.user or "")))
        parts += [string(_encode("argument", word)) for word in argv]
        parts += [string(_encode("environment variable", f"{name}={value}")) for name, value in environment.items()]
        parts += [_LIMIT.pack(resource, soft, hard) for resource, (soft, hard) in self.rlimits.items()]
        return request(EXEC, b"".join(parts))


@dataclass(frozen=True, slots=True)
class Exit:
    """How a command ended: ``returncode`` as in ``subprocess``, times in seconds, memory in KiB."""

    returncode: int
    timed_out: bool
    dumped_core: bool
    pid: int
    duration_s: float
    user_s: float
    system_s: float
    maxrss_kib: int

    @classmethod
    def decode(cls, payload: bytes) -> Exit:
        """From an EXIT frame."""
        code, flags, pid, _, wall, user, system, maxrss = PayloadReader(payload).unpack(_EXIT)
        if not -64 <= code <= 255:
            raise ExecError(f"the guest agent sent the exit code {code}")
        timed_out, core = bool(flags & EXIT_TIMED_OUT), bool(flags & EXIT_CORE)
        return cls(code, timed_out, core, pid, wall / 1e9, user / 1e6, system / 1e6, maxrss)


@dataclass(frozen=True, slots=True)
class Ready:
    """What the agent says when it is up. Times are nanoseconds since the guest's kernel started."""

    version: int
    port: int
    started_ns: int
    ready_ns: int
    kernel: str
    error: str

    @classmethod
    def decode(cls, payload: bytes) -> Ready:
        """From a READY frame."""
        reader = PayloadReader(payload)
        version, port, started, ready = reader.unpack(_READY)
        return cls(version, port, started, ready, plain(reader.string()), plain(reader.string(), 300))


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """The state of the guest. Memory in bytes."""

    uptime_s: float
    clock_ns: int
    memory_total: int
    memory_free: int
    memory_available: int
    load: tuple[float, float, float]
    processes: int
    kernel: str
    hostname: str

    @classmethod
    def decode(cls, payload: bytes) -> GuestInfo:
        """From the answer to INFO."""
        reader = PayloadReader(payload)
        uptime, clock, total, free, available, one, five, fifteen, processes = reader.unpack(_INFO)
        load = (one / 65536, five / 65536, fifteen / 65536)
        kernel, hostname = plain(reader.string()), plain(reader.string())
        return cls(uptime / 1e9, clock, total, free, available, load, processes, kernel, hostname)


_TYPES: Final = {0o100000: "file", 0o040000: "directory", 0o120000: "symlink"}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What the guest says of a file. ``mode`` is its permission bits, ``mtime_ns`` since 1970, ``raw_name`` exact."""

    name: str
    type: str
    size: int
    mode: int
    mtime_ns: int
    uid: int
    gid: int
    links: int
    target: str
    raw_name: bytes
    raw_target: bytes

    @property
    def mtime(self) -> float:
        """Seconds since 1970."""
        return self.mtime_ns / 1e9

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return self.type == "directory"

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.type == "file"

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self.type == "symlink"

    @classmethod
    def take(cls, reader: PayloadReader) -> FileInfo:
        """The next record."""
        mode, uid, gid, links, size, mtime = reader.unpack(_RECORD)
        name, target = reader.string(), reader.string()
        return cls(
            name.decode("utf-8", "surrogateescape"),
            _TYPES.get(mode & 0o170000, "other"),
            size,
            mode & 0o7777,
            mtime,
            uid,
            gid,
            links,
            target.decode("utf-8", "surrogateescape"),
            name,
            target,
        )


def records(payload: bytes) -> Iterator[FileInfo]:
    """The records of one DATA frame of a listing."""
    reader = PayloadReader(payload)
    while not reader.at_end:
        yield FileInfo.take(reader)


def pack_record(mode: int, size: int, mtime_ns: int, name: bytes, target: bytes = b"") -> bytes:
    """A record for ``tree-receive``. ``mode`` with the file type, 0 to end the stream."""
    return _RECORD.pack(mode, 0, 0, 0, size, mtime_ns) + string(name) + string(target)


def refusal(payload: bytes) -> tuple[int, str, str]:
    """An ERROR frame: errno, stage, text."""
    reader = PayloadReader(payload)
    (code,) = reader.unpack(_U32)
    return code, plain(reader.string()), plain(reader.string()).lower()


def random_seed() -> bytes:
    """Enough fresh randomness to make a guest's generator its own."""
    return os.urandom(64)
