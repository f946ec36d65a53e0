"""A running command in the guest, in the manner of ``subprocess.Popen``.

There is no thread behind it. Whoever needs something from the guest (output, the exit, room for input) and finds nobody
receiving becomes the one who receives, for all; the others sleep until there is something for them or the receiver has
what it wanted. Windows (see protocol.py) bound what is held for streams that nobody reads.
"""

from __future__ import annotations

import io
import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from ..errors import ExecError, StateError
from . import protocol as wire
from .channel import LOST, Channel
from .exchange import END_OF_STDIN, Exchange, resize_frame, signal_frame
from .operations import DEFAULT_MAX_OUTPUT, Collector, Result

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_READ_BUFFER: Final = 64 << 10


class Process:
    """A command that runs in the guest. All methods may be called from any thread.

    ``stdout`` and ``stderr`` are readable binary files, ``stdin`` is an unbuffered writable one; None where they were
    not asked for. ``returncode`` is None while it runs, then as in ``subprocess``. Closing it, also by leaving its
    ``with`` block, ends the command.
    """

    def __init__(self, channel: Channel, request: wire.ExecRequest, args: list[str], done: Callable[[Channel], None]):
        self.args = args
        self._channel = channel
        self._done = done  # takes the channel back once the command is over
        self._request = request
        self._exchange = Exchange(args[0], request.window)
        self._changed = threading.Condition()
        self._receiving = False
        self._sending = threading.Lock()
        self._lost: ExecError | None = None
        self._closed = False
        self._stdin_ended = request.stdin == wire.STDIO_NULL and not request.pty
        self.stdin: BinaryIO | None = None
        self.stdout: BinaryIO | None = None
        self.stderr: BinaryIO | None = None
        if not self._stdin_ended:
            self.stdin = cast(BinaryIO, _Input(self))
        if request.stdout == wire.STDIO_STREAM or request.pty:
            self.stdout = io.BufferedReader(_Output(self, wire.STREAM_STDOUT), _READ_BUFFER)
        if request.stderr == wire.STDIO_STREAM and not request.pty:
            self.stderr = io.BufferedReader(_Output(self, wire.STREAM_STDERR), _READ_BUFFER)

    def begin(self, deadline: float | None) -> None:
        """Send the request and wait until the command runs. Raises ExecError when it cannot be started."""
        self._channel.send(self._request.encode(), deadline)
        self._wait_for(lambda: self._exchange.pid is not None or self._exchange.over, deadline)
        if self._exchange.failure:
            self._release()
            raise self._exchange.failure

    @property
    def pid(self) -> int:
        """Its process id in the guest."""
        assert self._exchange.pid is not None
        return self._exchange.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None as long as it is not known to have ended."""
        return self._exchange.exit.returncode if self._exchange.exit else None

    @property
    def exit(self) -> wire.Exit | None:
        """How it ended, with its times and memory."""
        return self._exchange.exit

    @property
    def timed_out(self) -> bool:
        """Whether it was ended because its ``timeout`` was over."""
        return self._exchange.exit is not None and self._exchange.exit.timed_out

    def poll(self) -> int | None:
        """The return code if it has ended, without waiting."""
        try:
            self._wait_for(lambda: self._exchange.over, time.monotonic())
        except TimeoutError:
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Its output must be read meanwhile, or it may wait for that.

        Raises TimeoutError after ``timeout`` seconds (the command runs on) and ExecError when the guest is gone.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._wait_for(lambda: self._exchange.over, deadline)
        except TimeoutError:
            raise TimeoutError(f"{self.args[0]} did not end within {timeout:g} s") from None
        code = self.returncode
        assert code is not None
        return code

    def communicate(
        self, input: bytes | None = None, timeout: float | None = None, max_output: int = DEFAULT_MAX_OUTPUT
    ) -> Result:
        """Send ``input``, read everything and wait for the end.

        Raises TimeoutError after ``timeout`` seconds (the command runs on; what was read is lost), ExecTimeout when
        the command's own time was over, and ExecError when a stream is longer than ``max_output`` bytes.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        collector = Collector(self._exchange, max_output)
        data = memoryview(input or b"")
        for stream in (self.stdout, self.stderr):
            if stream is not None and not stream.closed:
                stream.close()
        while True:
            with self._changed:
                grants = collector.collect()
                over = self._exchange.over
                piece, size = (b"", 0) if self._exchange.stdin_closed else self._exchange.stdin_frame(data)
            data = data[size:]
            if over:
                break
            if self._exchange.stdin_closed:
                data = data[:0]
            self._send(grants + piece, deadline)
            if not data:
                self.end_stdin()
            waiting = bool(data)
            self._wait_for(lambda: self._has_news(waiting), deadline)  # noqa: B023 - called before the next round
        if self.timed_out:
            raise collector.timeout(self._request.timeout_ns / 1e9)
        return collector.result(self.args)

    def _has_news(self, has_input: bool) -> bool:
        """Whether `communicate` has something to do."""
        exchange = self._exchange
        if exchange.over or any(stream.held for stream in exchange.streams.values()):
            return True
        return has_input and (exchange.stdin_credit > 0 or exchange.stdin_closed)

    def send_signal(self, signal: int) -> None:
        """Send a signal (the guest's number) to the command's process group. Nothing happens once it has ended."""
        if self.poll() is None:
            self._send(signal_frame(int(signal)))

    def terminate(self) -> None:
        """Ask it to end: SIGTERM."""
        self.send_signal(wire.SIGTERM)

    def kill(self) -> None:
        """End it: SIGKILL. What it started and left in another process group ends with it."""
        self.send_signal(wire.SIGKILL)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        if not self._exchange.over:
            self._send(resize_frame(rows, columns))

    def end_stdin(self) -> None:
        """No more input. On a terminal this is what Ctrl-D does."""
        with self._sending:
            if self._stdin_ended:
                return
            self._stdin_ended = True
        if not self._exchange.over:
            self._send(END_OF_STDIN)

    def close(self) -> None:
        """End the command if it still runs, and let go of the connection."""
        self._closed = True
        if not self._channel.closed and not self._exchange.over:
            self._channel.hang_up()
            with self._changed:
                if not self._receiving:
                    self._channel.close()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._exchange.over and not self._channel.closed:
            warnings.warn(f"{self.args[0]} still runs in the guest and is ended", ResourceWarning, stacklevel=2)
            self._channel.close()

    def _send(self, data: bytes, deadline: float | None = None) -> None:
        if not data:
            return
        with self._sending:
            if self._exchange.over:
                return
            if self._channel.closed or self._lost:
                raise self._lost or StateError(f"{self.args[0]}: the process was closed")
            self._channel.send(data, deadline)

    def _wait_for(self, ready: Callable[[], object], deadline: float | None) -> None:
        """Wait until ``ready``. Raises TimeoutError at the deadline, ExecError when the connection is lost."""
        with self._changed:
            while not ready():
                if self._exchange.over:
                    return
                if self._lost:
                    raise self._lost
                if self._closed and self._channel.closed:
                    raise StateError(f"{self.args[0]}: the process was closed")
                left = None if deadline is None else deadline - time.monotonic()
                if self._receiving:
                    if not self._changed.wait(None if left is None else max(left, 0)) and left is not None:
                        raise TimeoutError
                    continue
                self._receiving = True
                try:
                    self._receive(deadline)
                finally:
                    self._receiving = False
                    if self._closed and not self._exchange.over:
                        self._channel.close()
                    self._changed.notify_all()

    def _receive(self, deadline: float | None) -> None:
        """Receive once, with the lock let go meanwhile."""
        self._changed.release()
        alive = True
        try:
            alive = self._channel.fill(deadline)
        finally:
            self._changed.acquire()
        try:
            while (frame := self._channel.pop()) is not None:
                self._exchange.handle(frame)
        except ExecError as error:
            self._lost = error
            self._channel.hang_up()
            return
        if self._exchange.over:
            self._release()
        elif not alive:
            self._lost = ExecError(LOST)

    def _release(self) -> None:
        done, self._done = self._done, _nobody
        done(self._channel)

    def read_output(self, stream: int, size: int) -> bytes:
        """Up to ``size`` bytes of a stream, at least one unless it has ended."""
        state = self._exchange.streams[stream]
        self._wait_for(lambda: state.held or state.ended, None)
        with self._changed:
            data, grant = self._exchange.take(stream, size)
        try:
            self._send(grant)
        except ExecError:
            pass  # what has come is still good; the next read will say that the guest is gone
        return data

    def write_input(self, data: memoryview) -> None:
        """Send all of ``data``, as fast as the command takes it."""
        while data:
            self._wait_for(lambda: self._exchange.stdin_credit > 0 or self._exchange.stdin_closed, None)
            with self._changed:
                if self._exchange.stdin_closed:
                    raise BrokenPipeError(f"{self.args[0]} no longer reads its input")
                piece, size = self._exchange.stdin_frame(data)
            self._send(piece)
            data = data[size:]


def _nobody(_channel: Channel) -> None:
    pass


class _Output(io.RawIOBase):
    def __init__(self, process: Process, stream: int) -> None:
        self._process = process
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        data = self._process.read_output(self._stream, len(view))
        view[: len(data)] = data
        return len(data)


class _Input(io.RawIOBase):
    def __init__(self, process: Process) -> None:
        self._process = process

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer) -> int:
        if self.closed:
            raise ValueError("write to closed file")
        view = memoryview(data).cast("B")
        self._process.write_input(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            try:
                self._process.end_stdin()
            except (ExecError, StateError):
                pass
            super().close()
