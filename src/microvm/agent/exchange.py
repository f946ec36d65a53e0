"""One command as its connection tells it, without input or output: what the sync and the async client share."""

from __future__ import annotations

import struct
from collections import deque
from typing import Final

from ..errors import ExecError, GuestFileError, GuestFileNotFound
from . import protocol as wire

_ENOENT: Final = 2
_U32: Final = struct.Struct("<I")


def start_error(payload: bytes, argv0: str) -> ExecError:
    """Why a command did not start."""
    code, stage, text = wire.refusal(payload)
    if stage == "exec":
        return ExecError(f"cannot run {argv0}: {text}", code)
    if stage == "user" and code == _ENOENT:
        return ExecError(f"cannot run {argv0}: the guest has no such user or group", code)
    return ExecError(f"cannot run {argv0}: {stage}: {text}", code)


def file_error(code: int, text: str, path: wire.GuestPath) -> GuestFileError:
    """Why a file operation was refused."""
    kind = GuestFileNotFound if code == _ENOENT else GuestFileError
    return kind(code, text, wire.show_path(path))


class Stream:
    """Output that has arrived and was not read yet; never more than the window that was granted."""

    __slots__ = ("_chunks", "_head", "_window", "consumed", "ended", "granted", "held")

    def __init__(self, window: int) -> None:
        self._chunks: deque[bytes] = deque()
        self._head = 0  # bytes of the first chunk that were read
        self._window = window
        self.granted = window  # what the guest may still send
        self.consumed = 0  # read and not granted again
        self.held = 0
        self.ended = False

    def put(self, data: bytes) -> None:
        """Take a DATA frame. Raises ExecError when the guest sends more than it was granted."""
        if len(data) > self.granted or self.ended:
            raise ExecError("the guest agent sent more output than it was granted")
        if data:
            self.granted -= len(data)
            self.held += len(data)
            self._chunks.append(data)

    def take(self, size: int) -> bytes:
        """Up to ``size`` bytes of what is there."""
        if not self._chunks:
            return b""
        first = self._chunks[0]
        if not self._head and len(first) <= size:
            piece = first
        else:
            piece = first[self._head : self._head + size]
        self._head += len(piece)
        if self._head >= len(first):
            self._chunks.popleft()
            self._head = 0
        self.held -= len(piece)
        self.consumed += len(piece)
        return piece

    def grant(self) -> int:
        """How much to grant now: half a window at a time, so that a grant is worth its frame."""
        if self.ended or self.consumed * 2 < self._window:
            return 0
        credit, self.consumed = self.consumed, 0
        self.granted += credit
        return credit


class Exchange:
    """The state of one command. `handle` takes frames; the rest is read off it. Not thread-safe."""

    def __init__(self, argv0: str, window: int = wire.OUTPUT_WINDOW) -> None:
        self.argv0 = argv0
        self.streams = {wire.STREAM_STDOUT: Stream(window), wire.STREAM_STDERR: Stream(window)}
        self.pid: int | None = None
        self.exit: wire.Exit | None = None
        self.failure: ExecError | None = None  # the command did not start
        self.stdin_credit = wire.STDIN_WINDOW
        self.stdin_closed = False  # nobody in the guest reads it any more

    @property
    def over(self) -> bool:
        """Whether no more frames will come."""
        return self.exit is not None or self.failure is not None

    def handle(self, frame: wire.Frame) -> None:
        """Take a frame. Raises ExecError for one that has no place here."""
        kind, arg, payload = frame
        if kind == wire.DATA and arg in self.streams:
            self.streams[arg].put(payload)
        elif kind == wire.END and arg == wire.STREAM_STDIN:
            self.stdin_closed = True
        elif kind == wire.END and arg in self.streams:
            self.streams[arg].ended = True
        elif kind == wire.WINDOW and arg == wire.STREAM_STDIN and len(payload) == 4:
            # A guest that grants without end gains nothing: we send only what the caller gave.
            self.stdin_credit += _U32.unpack(payload)[0]
        elif kind == wire.STARTED and len(payload) == 4 and self.pid is None:
            self.pid = _U32.unpack(payload)[0]
        elif kind == wire.EXIT:
            self.exit = wire.Exit.decode(payload)
            self.pid = self.exit.pid
            self._end()
        elif kind == wire.ERROR:
            self.failure = start_error(payload, self.argv0)
            self._end()
        else:
            raise ExecError(f"the guest agent sent an unexpected frame of type {kind:#x}")

    def _end(self) -> None:
        self.stdin_closed = True
        for stream in self.streams.values():
            stream.ended = True

    def take(self, stream: int, size: int) -> tuple[bytes, bytes]:
        """Output, and the frame that grants as much again (or nothing) to be sent to the guest."""
        state = self.streams[stream]
        data = state.take(size)
        credit = state.grant()
        return data, wire.frame(wire.WINDOW, _U32.pack(credit), stream) if credit else b""

    def stdin_frame(self, data: memoryview) -> tuple[bytes, int]:
        """A DATA frame with as much of ``data`` as the guest takes now, and how much that is."""
        size = min(len(data), self.stdin_credit, wire.CHUNK)
        if size == 0:
            return b"", 0
        self.stdin_credit -= size
        return wire.frame(wire.DATA, bytes(data[:size]), wire.STREAM_STDIN), size


END_OF_STDIN: Final = wire.frame(wire.END, b"", wire.STREAM_STDIN)


def signal_frame(number: int) -> bytes:
    """Ask for a signal to the command's process group."""
    return wire.frame(wire.SIGNAL, _U32.pack(number))


def resize_frame(rows: int, columns: int) -> bytes:
    """Tell the command's terminal its size."""
    return wire.frame(wire.RESIZE, struct.pack("<HH", rows, columns))
