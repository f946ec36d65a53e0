"""`AgentClient` for asyncio: the same names and the same errors, with `await`.

Operations are the very generators that the sync client drives. A running command has a task that receives for it;
windows bound what that task holds. Files of the host are read and written in the event loop's thread, in pieces.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import stat as stat_bits
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeVar

from ..errors import BootError, ExecError, GuestFileError, GuestFileNotFound, StateError
from . import operations as op
from . import protocol as wire
from . import trees
from .channel import LOST
from .client import DEVNULL, GRACE_S, PIPE, STDOUT, exec_request
from .exchange import END_OF_STDIN, Exchange, resize_frame, signal_frame

__all__ = ["DEVNULL", "PIPE", "STDOUT", "AsyncAgentClient", "AsyncFiles", "AsyncProcess"]

T = TypeVar("T")
Connect = Callable[[], socket.socket | Awaitable[socket.socket]]

_RECEIVE: Final = 64 << 10
_SPARE_CONNECTIONS: Final = 4


class AsyncChannel:
    """Frames over a pair of asyncio streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._parser = wire.FrameParser()

    @property
    def fresh(self) -> bool:
        """Whether the next request can use it."""
        return self._parser.empty and not self._writer.is_closing() and not self._reader.at_eof()

    async def send(self, data: bytes) -> None:
        """Send all of ``data``."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ExecError(LOST) from error

    async def receive(self) -> wire.Frame:
        """The next frame."""
        while (found := self._parser.pop()) is None:
            try:
                data = await self._reader.read(_RECEIVE)
            except OSError as error:
                raise ExecError(LOST) from error
            if not data:
                raise ExecError(LOST)
            self._parser.feed(data)
        return found

    def close(self) -> None:
        """End the connection. The guest ends what ran on it."""
        self._writer.close()


class AsyncReader:
    """A command's output: read, readline, async iteration over lines."""

    def __init__(self, process: AsyncProcess, stream: int) -> None:
        self._process = process
        self._stream = stream
        self._line = bytearray()  # read ahead by readline

    async def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes, at least one unless the stream has ended; everything by default."""
        if self._line and size != 0:
            count = len(self._line) if size < 0 else size
            data = bytes(self._line[:count])
            del self._line[:count]
            return data + await self.read() if size < 0 else data
        if size >= 0:
            return await self._process.read_output(self._stream, size)
        pieces = []
        while data := await self._process.read_output(self._stream, wire.MAX_PAYLOAD):
            pieces.append(data)
        return b"".join(pieces)

    async def readline(self) -> bytes:
        """The next line with its end; shorter at the end of the stream."""
        searched = 0
        while (end := self._line.find(b"\n", searched)) < 0:
            searched = len(self._line)
            data = await self._process.read_output(self._stream, wire.MAX_PAYLOAD)
            if not data:
                end = len(self._line) - 1
                break
            self._line += data
        line = bytes(self._line[: end + 1])
        del self._line[: end + 1]
        return line

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while line := await self.readline():
            yield line


class AsyncWriter:
    """A command's input."""

    def __init__(self, process: AsyncProcess) -> None:
        self._process = process

    async def write(self, data: bytes | memoryview) -> None:
        """Send all of ``data``, as fast as the command takes it. Raises BrokenPipeError when it no longer reads."""
        await self._process.write_input(memoryview(data))

    async def close(self) -> None:
        """No more input."""
        await self._process.end_stdin()


class AsyncProcess:
    """A command that runs in the guest; see `microvm.agent.process.Process`."""

    def __init__(
        self, channel: AsyncChannel, request: wire.ExecRequest, args: list[str], done: Callable[[AsyncChannel], None]
    ) -> None:
        self.args = args
        self._channel = channel
        self._done = done
        self._request = request
        self._exchange = Exchange(args[0], request.window)
        self._changed = asyncio.Condition()
        self._lost: ExecError | None = None
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._stdin_ended = request.stdin == wire.STDIO_NULL and not request.pty
        self.stdin = None if self._stdin_ended else AsyncWriter(self)
        has_stdout = request.stdout == wire.STDIO_STREAM or request.pty
        has_stderr = request.stderr == wire.STDIO_STREAM and not request.pty
        self.stdout = AsyncReader(self, wire.STREAM_STDOUT) if has_stdout else None
        self.stderr = AsyncReader(self, wire.STREAM_STDERR) if has_stderr else None

    async def begin(self) -> None:
        """Send the request and wait until the command runs. Raises ExecError when it cannot be started."""
        await self._channel.send(self._request.encode())
        while self._exchange.pid is None and not self._exchange.over:
            self._exchange.handle(await self._channel.receive())
        if self._exchange.failure:
            self._done(self._channel)
            raise self._exchange.failure
        if self._exchange.over:
            self._done(self._channel)
        else:
            self._task = asyncio.create_task(self._receive())

    async def _receive(self) -> None:
        try:
            while not self._exchange.over:
                frame = await self._channel.receive()
                async with self._changed:
                    self._exchange.handle(frame)
                    self._changed.notify_all()
            self._done(self._channel)
        except ExecError as error:
            self._channel.close()
            async with self._changed:
                self._lost = error
                self._changed.notify_all()

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

    async def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Its output must be read meanwhile. Raises TimeoutError after ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._wait_for(lambda: self._exchange.over)
        except TimeoutError as error:
            if isinstance(error, ExecError):
                raise
            raise TimeoutError(f"{self.args[0]} did not end within {timeout:g} s") from None
        code = self.returncode
        assert code is not None
        return code

    async def communicate(
        self, input: bytes | None = None, timeout: float | None = None, max_output: int = op.DEFAULT_MAX_OUTPUT
    ) -> op.Result:
        """Send ``input``, read everything and wait for the end; see `Process.communicate`."""
        collector = op.Collector(self._exchange, max_output)

        async def feed() -> None:
            try:
                if input:
                    await self.write_input(memoryview(input))
                await self.end_stdin()
            except (BrokenPipeError, ExecError):
                pass  # it ends without its input, or the guest is gone: the other side will say so

        feeding = asyncio.create_task(feed())
        try:
            async with asyncio.timeout(timeout):
                while True:
                    grants = collector.collect()
                    if self._exchange.over:
                        break
                    await self._send(grants)
                    streams = self._exchange.streams.values()
                    await self._wait_for(lambda: self._exchange.over or any(stream.held for stream in streams))  # noqa: B023
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
        if self.timed_out:
            raise collector.timeout(self._request.timeout_ns / 1e9)
        return collector.result(self.args)

    async def send_signal(self, signal: int) -> None:
        """Send a signal (the guest's number) to the command's process group."""
        await self._send(signal_frame(int(signal)))

    async def terminate(self) -> None:
        """Ask it to end: SIGTERM."""
        await self.send_signal(wire.SIGTERM)

    async def kill(self) -> None:
        """End it: SIGKILL."""
        await self.send_signal(wire.SIGKILL)

    async def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal."""
        await self._send(resize_frame(rows, columns))

    async def end_stdin(self) -> None:
        """No more input. On a terminal this is what Ctrl-D does."""
        if not self._stdin_ended:
            self._stdin_ended = True
            await self._send(END_OF_STDIN)

    async def close(self) -> None:
        """End the command if it still runs, and let go of the connection."""
        self._closed = True
        if self._task:
            if not self._exchange.over:
                self._task.cancel()
                self._channel.close()
            await asyncio.gather(self._task, return_exceptions=True)
        async with self._changed:
            self._changed.notify_all()

    async def __aenter__(self) -> AsyncProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _send(self, data: bytes) -> None:
        if not data or self._exchange.over:
            return
        if self._lost:
            raise self._lost
        if self._closed:
            raise StateError(f"{self.args[0]}: the process was closed")
        await self._channel.send(data)

    async def _wait_for(self, ready: Callable[[], object]) -> None:
        async with self._changed:
            while not ready() and not self._exchange.over:
                if self._lost:
                    raise self._lost
                if self._closed:
                    raise StateError(f"{self.args[0]}: the process was closed")
                await self._changed.wait()

    async def read_output(self, stream: int, size: int) -> bytes:
        """Up to ``size`` bytes of a stream, at least one unless it has ended."""
        state = self._exchange.streams[stream]
        await self._wait_for(lambda: state.held or state.ended)
        data, grant = self._exchange.take(stream, size)
        try:
            await self._send(grant)
        except ExecError:
            pass  # what has come is still good; the next read will say that the guest is gone
        return data

    async def write_input(self, data: memoryview) -> None:
        """Send all of ``data``, as fast as the command takes it."""
        while data:
            await self._wait_for(lambda: self._exchange.stdin_credit > 0 or self._exchange.stdin_closed)
            if self._exchange.stdin_closed:
                raise BrokenPipeError(f"{self.args[0]} no longer reads its input")
            piece, size = self._exchange.stdin_frame(data)
            await self._send(piece)
            data = data[size:]


class AsyncAgentClient:
    """Talks to the agent of one guest; see `microvm.agent.client.AgentClient`. For one event loop.

    ``connect`` may be a plain function, which must not block, or a coroutine function.
    """

    def __init__(self, connect: Connect, request_timeout_s: float = 60.0) -> None:
        self._connect = connect
        self._spare: list[AsyncChannel] = []
        self._closed = False
        self.request_timeout_s = request_timeout_s
        self.files = AsyncFiles(self)

    async def wait_ready(self, sock: socket.socket, timeout: float | None = None) -> wire.Ready:
        """Read READY from the connection that the guest opened, and keep it for the first request."""
        sock.setblocking(False)
        channel = AsyncChannel(*await asyncio.open_connection(sock=sock))
        try:
            async with asyncio.timeout(timeout):
                frame = await channel.receive()
            if frame.type != wire.READY:
                raise ExecError(f"the guest agent sent an unexpected frame of type {frame.type:#x}")
            ready = wire.Ready.decode(frame.payload)
            if ready.version != wire.VERSION:
                raise ExecError(f"the guest agent speaks version {ready.version} of the protocol, not {wire.VERSION}")
            if ready.error:
                raise BootError(f"the guest could not set itself up: {ready.error}")
        except BaseException:
            channel.close()
            raise
        self._give_back(channel)
        return ready

    async def run(
        self,
        argv: Sequence[wire.Text],
        *,
        input: bytes | None = None,
        timeout: float | None = None,
        check: bool = False,
        env: Mapping[str, str] | None = None,
        replace_env: bool = False,
        cwd: wire.GuestPath | None = None,
        user: str | None = None,
        stdout: int = PIPE,
        stderr: int = PIPE,
        max_output: int = op.DEFAULT_MAX_OUTPUT,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        no_new_privs: bool = False,
        leave_running: bool = False,
    ) -> op.Result:
        """Run a command and wait for its end and its output; see `AgentClient.run`. Cancelling it ends the command."""
        request = exec_request(
            argv,
            stdin=DEVNULL if input is None else PIPE,
            stdout=stdout,
            stderr=stderr,
            env=env,
            replace_env=replace_env,
            cwd=cwd,
            user=user,
            pty=None,
            timeout=timeout,
            rlimits=rlimits,
            no_new_privs=no_new_privs,
            leave_running=leave_running,
            started=False,
        )
        deadline = None if timeout is None else time.monotonic() + timeout + GRACE_S
        result = await self._drive(op.run(request, input, timeout, max_output), lambda: deadline)
        return result.check() if check else result

    async def start(
        self,
        argv: Sequence[wire.Text],
        *,
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        pty: tuple[int, int] | None = None,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        replace_env: bool = False,
        cwd: wire.GuestPath | None = None,
        user: str | None = None,
        rlimits: Mapping[int, tuple[int, int]] | None = None,
        no_new_privs: bool = False,
        leave_running: bool = False,
    ) -> AsyncProcess:
        """Start a command and go on; see `AgentClient.start`."""
        request = exec_request(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=env,
            replace_env=replace_env,
            cwd=cwd,
            user=user,
            pty=pty,
            timeout=timeout,
            rlimits=rlimits,
            no_new_privs=no_new_privs,
            leave_running=leave_running,
            started=True,
        )
        request.encode()
        channel = await self._take()
        process = AsyncProcess(channel, request, op.command_words(request), self._give_back)
        try:
            async with asyncio.timeout(self.request_timeout_s):
                await process.begin()
        except TimeoutError:
            channel.close()
            raise ExecError(f"the guest did not answer within {self.request_timeout_s:g} s") from None
        except ExecError as error:
            if error.code == 0:
                channel.close()
            raise
        except BaseException:
            channel.close()
            raise
        return process

    async def ping(self, timeout: float | None = None) -> float:
        """Ask the agent for a sign of life. Returns the seconds it took."""
        begin = time.monotonic()
        await self.perform(op.simple(wire.PING, b""), timeout)
        return time.monotonic() - begin

    async def info(self) -> wire.GuestInfo:
        """The guest's uptime, clock, memory and load."""
        return wire.GuestInfo.decode(await self.perform(op.simple(wire.INFO, b"")))

    async def set_clock(self, time_ns: int | None = None) -> None:
        """Set the guest's clock to ``time_ns`` since 1970, by default to the host's."""
        await self.perform(op.set_clock(time.time_ns() if time_ns is None else time_ns))

    async def reseed(self, seed: bytes | None = None) -> None:
        """Mix randomness into the guest's generator."""
        await self.perform(op.simple(wire.RESEED, wire.random_seed() if seed is None else seed))

    async def sync(self) -> None:
        """Have the guest write everything to its disks."""
        await self.perform(op.simple(wire.SYNC, b""))

    async def freeze(self) -> None:
        """Hold the disk that takes the guest's writes still until `thaw`."""
        await self.perform(op.simple(wire.FREEZE, b""))

    async def thaw(self) -> None:
        """End `freeze`."""
        await self.perform(op.simple(wire.THAW, b""))

    async def shutdown(self, *, restart: bool = False, grace_s: float = 2.0) -> None:
        """End the guest in good order; see `AgentClient.shutdown`."""
        await self.perform(op.shutdown(restart, grace_s))

    async def forget_connections(self) -> None:
        """Drop the spare connections, which a restored or restarted guest does not know."""
        spare, self._spare = self._spare, []
        for channel in spare:
            channel.close()

    async def close(self) -> None:
        """Drop the spare connections and take none back."""
        self._closed = True
        await self.forget_connections()

    async def __aenter__(self) -> AsyncAgentClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def perform(self, operation: op.Operation[T], timeout: float | None = None) -> T:
        """Drive an operation. The guest may be silent for ``timeout`` seconds, not longer."""
        patience = self.request_timeout_s if timeout is None else timeout
        try:
            return await self._drive(operation, lambda: time.monotonic() + patience)
        except TimeoutError as error:
            if isinstance(error, ExecError):
                raise
            raise ExecError(f"the guest did not answer within {patience:g} s") from None

    async def _drive(self, operation: op.Operation[T], deadline: Callable[[], float | None]) -> T:
        item = next(operation)
        channel = await self._take()
        try:
            while True:
                frame = None
                try:
                    end = deadline()
                    async with asyncio.timeout(None if end is None else end - time.monotonic()):
                        if item is None:
                            frame = await channel.receive()
                        else:
                            await channel.send(item)
                except TimeoutError as error:
                    item = operation.throw(error)
                    continue
                item = next(operation) if frame is None else operation.send(frame)
        except StopIteration as stop:
            self._give_back(channel)
            result: T = stop.value
            return result
        except BaseException:
            channel.close()
            operation.close()
            raise

    async def _take(self) -> AsyncChannel:
        while self._spare:
            channel = self._spare.pop()
            if channel.fresh:
                return channel
            channel.close()
        try:
            connected = self._connect()
            sock = connected if isinstance(connected, socket.socket) else None
            if sock is None and inspect.isawaitable(connected):
                sock = await connected
            assert sock is not None
            sock.setblocking(False)
            return AsyncChannel(*await asyncio.open_connection(sock=sock))
        except OSError as error:
            if isinstance(error, ExecError):
                raise
            reason = (error.strerror or str(error)).lower()
            raise ExecError(f"cannot connect to the guest agent: {reason}") from error

    def _give_back(self, channel: AsyncChannel) -> None:
        if channel.fresh and not self._closed and len(self._spare) < _SPARE_CONNECTIONS:
            self._spare.append(channel)
        else:
            channel.close()


class AsyncFiles:
    """Reads and writes files in the guest; see `microvm.agent.files.Files`."""

    def __init__(self, client: AsyncAgentClient) -> None:
        self._client = client

    async def read(
        self,
        path: wire.GuestPath,
        *,
        offset: int = 0,
        limit: int | None = None,
        max_size: int = op.DEFAULT_MAX_FILE,
    ) -> bytes:
        """The contents of a regular file."""
        return await self._client.perform(op.read_file(path, offset, limit, max_size))

    async def read_text(self, path: wire.GuestPath) -> str:
        """The contents of a UTF-8 file."""
        return (await self.read(path)).decode()

    async def write(
        self,
        path: wire.GuestPath,
        data: bytes | bytearray | memoryview | str,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        append: bool = False,
        exclusive: bool = False,
        parents: bool = False,
        in_place: bool = False,
    ) -> None:
        """Write a file, which appears whole or not at all; see `Files.write`."""
        options = op.WriteOptions(
            mode=mode, uid=uid, gid=gid, append=append, exclusive=exclusive, parents=parents, in_place=in_place
        )
        content = data.encode() if isinstance(data, str) else memoryview(data)
        await self._client.perform(op.write_file(path, content, options))

    async def list(self, path: wire.GuestPath = "/") -> Sequence[wire.FileInfo]:
        """The files of a directory, sorted by name."""
        return await self._client.perform(op.list_directory(path))

    async def stat(self, path: wire.GuestPath, *, follow: bool = True) -> wire.FileInfo:
        """What a file is."""
        return await self._client.perform(op.stat(path, follow))

    async def exists(self, path: wire.GuestPath) -> bool:
        """Whether there is such a file."""
        try:
            await self.stat(path)
        except GuestFileNotFound:
            return False
        return True

    async def mkdir(self, path: wire.GuestPath, *, mode: int | None = None, parents: bool = False) -> None:
        """Make a directory."""
        await self._client.perform(op.mkdir(path, mode, parents))

    async def remove(self, path: wire.GuestPath, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, an empty directory or (``recursive``) any directory."""
        if recursive:
            await self._client.perform(op.remove_tree(path, missing_ok))
        else:
            await self._client.perform(op.remove(path, missing_ok))

    async def rename(self, old: wire.GuestPath, new: wire.GuestPath) -> None:
        """Rename a file, in place of what is there."""
        await self._client.perform(op.two_paths(wire.RENAME, old, new))

    async def symlink(self, target: wire.GuestPath, path: wire.GuestPath) -> None:
        """Make the symbolic link ``path`` to ``target``."""
        await self._client.perform(op.two_paths(wire.SYMLINK, target, path))

    async def chmod(self, path: wire.GuestPath, mode: int) -> None:
        """Set a file's permissions."""
        await self._client.perform(op.set_attributes(path, mode, None, None))

    async def chown(self, path: wire.GuestPath, uid: int | None = None, gid: int | None = None) -> None:
        """Set a file's owner, group or both."""
        await self._client.perform(op.set_attributes(path, None, uid, gid))

    async def put(
        self,
        local: str | os.PathLike[str],
        remote: wire.GuestPath,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        """Copy a file or a directory of the host to the guest; see `Files.put`."""
        source = trees.local_path(local)
        if source.is_dir():
            await self._client.perform(trees.put_tree(source, remote, uid or 0, gid or 0))
            return
        if mode is None:
            mode = stat_bits.S_IMODE(source.stat().st_mode) & 0o777
        options = op.WriteOptions(mode=mode, uid=uid, gid=gid)
        await self._client.perform(trees.put_file(source, remote, options))

    async def get(
        self, remote: wire.GuestPath, local: str | os.PathLike[str], *, max_size: int | None = None
    ) -> Sequence[str]:
        """Copy a file or a directory of the guest to the host; see `Files.get`."""
        target = trees.local_path(local)
        try:
            await self._client.perform(trees.get_file(remote, target, max_size))
        except GuestFileError as error:
            if error.code != 21:  # EISDIR
                raise
            return await self._client.perform(trees.get_tree(remote, target, max_size))
        return []
