"""The host's side of the guest agent: run commands, move files, keep the guest's clock and end it in good order."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from ..errors import BootError, ConfigError, ExecError
from . import operations as op
from . import protocol as wire
from .channel import Channel
from .files import Files
from .process import Process

T = TypeVar("T")

PIPE: Final = -1  # the values of subprocess, without importing it
STDOUT: Final = -2
DEVNULL: Final = -3

_SPARE_CONNECTIONS: Final = 4
GRACE_S: Final = 5.0  # for the guest to end a command whose time is over, before the host gives up on it


def stdio_mode(what: str, value: int, merge: bool = False) -> int:
    """PIPE, DEVNULL or (for standard error) STDOUT in the protocol's terms. Raises ConfigError for anything else."""
    if value == PIPE:
        return wire.STDIO_STREAM
    if value == DEVNULL:
        return wire.STDIO_NULL
    if value == STDOUT and merge:
        return wire.STDIO_MERGE
    raise ConfigError(what, repr(value), "PIPE, DEVNULL or STDOUT (standard error only)")


def exec_request(
    argv: Sequence[wire.Text],
    *,
    stdin: int,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None,
    replace_env: bool,
    cwd: wire.GuestPath | None,
    user: str | None,
    pty: tuple[int, int] | None,
    timeout: float | None,
    rlimits: Mapping[int, tuple[int, int]] | None,
    no_new_privs: bool,
    leave_running: bool,
    started: bool,
) -> wire.ExecRequest:
    """The request for what `AgentClient.run` and `AgentClient.start` were asked."""
    if timeout is not None and not 0 < timeout < 1e9:
        raise ConfigError("timeout", repr(timeout), "seconds above 0 and below 10^9, or None")
    flags = (
        (wire.EXEC_ENV_REPLACE if replace_env else 0)
        | (wire.EXEC_NO_NEW_PRIVS if no_new_privs else 0)
        | (wire.EXEC_LEAVE if leave_running else 0)
        | (wire.EXEC_WANT_STARTED if started else 0)
    )
    return wire.ExecRequest(
        argv=argv,
        env=env,
        cwd=cwd,
        user=user,
        stdin=stdio_mode("stdin", stdin),
        stdout=stdio_mode("stdout", stdout),
        stderr=stdio_mode("stderr", stderr, merge=True),
        pty=pty,
        timeout_ns=0 if timeout is None else max(1, int(timeout * 1e9)),
        flags=flags,
        rlimits=rlimits or {},
    )


class AgentClient:
    """Talks to the agent of one guest. All methods may be called from any thread.

    Each call of ``connect`` gives a fresh stream socket that is connected to the agent's port; it raises OSError or
    ExecError when it cannot. ``request_timeout_s`` is how long a guest may be silent in the middle of anything but a
    command; a guest that is slower is taken for dead.
    """

    def __init__(self, connect: Callable[[], socket.socket], request_timeout_s: float = 60.0) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._spare: list[Channel] = []
        self._closed = False
        self.request_timeout_s = request_timeout_s
        self.files = Files(self)

    def wait_ready(self, sock: socket.socket, timeout: float | None = None) -> wire.Ready:
        """Read READY from ``sock``, the connection that the guest opened, and keep it for the first request.

        Raises TimeoutError, ExecError when the connection ends, and BootError when the guest has no root.
        """
        channel = Channel(sock)
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            frame = channel.receive(deadline)
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

    def adopt(self, sock: socket.socket) -> None:
        """Use ``sock``, which is connected to the agent and idle, for the next request."""
        self._give_back(Channel(sock))

    def release(self) -> socket.socket:
        """Give up an idle connection, for somebody else's `adopt`. Raises ExecError where it cannot be had."""
        return self._take().release()

    def run(
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
        """Run a command and wait for its end and its output.

        ``env`` adds to the guest's own environment, or is all of it (``replace_env``). ``timeout`` in seconds ends the
        command with all it started. What a command leaves running is ended with it unless ``leave_running``.

        Raises ExecError when it cannot be started or writes more than ``max_output`` bytes to a stream, ExecTimeout,
        CommandFailed (``check``) and ConfigError.
        """
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
        result = self._drive(op.run(request, input, timeout, max_output), lambda: deadline)
        return result.check() if check else result

    def start(
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
    ) -> Process:
        """Start a command and go on. ``pty``: rows and columns of a terminal for it, whose output is ``stdout`` then.

        Raises ExecError when it cannot be started.
        """
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
        request.encode()  # refuses before there is a connection to lose
        channel = self._take()
        try:
            process = Process(channel, request, op.command_words(request), self._give_back)
            process.begin(time.monotonic() + self.request_timeout_s)
        except TimeoutError:
            channel.close()
            raise ExecError(f"the guest did not answer within {self.request_timeout_s:g} s") from None
        except ExecError as error:
            if error.code == 0:  # not the guest's refusal, after which the connection is as good as before
                channel.close()
            raise
        except BaseException:
            channel.close()
            raise
        return process

    def ping(self, timeout: float | None = None) -> float:
        """Ask the agent for a sign of life. Returns the seconds it took."""
        begin = time.monotonic()
        self.perform(op.simple(wire.PING, b""), timeout)
        return time.monotonic() - begin

    def info(self) -> wire.GuestInfo:
        """The guest's uptime, clock, memory and load."""
        return wire.GuestInfo.decode(self.perform(op.simple(wire.INFO, b"")))

    def set_clock(self, time_ns: int | None = None) -> None:
        """Set the guest's clock to ``time_ns`` since 1970, by default to the host's."""
        self.perform(op.set_clock(time.time_ns() if time_ns is None else time_ns))

    def reseed(self, seed: bytes | None = None) -> None:
        """Mix up to 512 bytes of randomness into the guest's generator: clones must not draw the same numbers."""
        self.perform(op.simple(wire.RESEED, wire.random_seed() if seed is None else seed))

    def renew(self, *, frozen_clock: bool = False) -> None:
        """Make the guest, a copy, a machine of its own: clock (unless frozen), randomness, host name, machine id.

        Nothing else should be asked of it before.
        """
        identity = wire.random_seed()[:16].hex()
        self.perform(op.renew(0 if frozen_clock else time.time_ns(), f"microvm-{identity[:8]}", f"{identity}\n"))

    def sync(self) -> None:
        """Have the guest write everything to its disks."""
        self.perform(op.simple(wire.SYNC, b""))

    def freeze(self) -> None:
        """Make the disk that takes the guest's writes consistent and hold it still until `thaw`."""
        self.perform(op.simple(wire.FREEZE, b""))

    def thaw(self) -> None:
        """End `freeze`."""
        self.perform(op.simple(wire.THAW, b""))

    def shutdown(self, *, restart: bool = False, grace_s: float = 2.0) -> None:
        """End the guest in good order: SIGTERM, SIGKILL after ``grace_s``, disks written, power off or reset.

        Returns when the guest has begun; its end is seen at the machine.
        """
        self.perform(op.shutdown(restart, grace_s))

    def forget_connections(self) -> None:
        """Drop the spare connections, which a restored or restarted guest does not know."""
        with self._lock:
            spare, self._spare = self._spare, []
        for channel in spare:
            channel.close()

    def close(self) -> None:
        """Drop the spare connections and take none back. Running commands keep theirs."""
        self._closed = True
        self.forget_connections()

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perform(self, operation: op.Operation[T], timeout: float | None = None) -> T:
        """Drive an operation (operations.py). The guest may be silent for ``timeout`` seconds, not longer."""
        patience = self.request_timeout_s if timeout is None else timeout
        try:
            return self._drive(operation, lambda: time.monotonic() + patience)
        except TimeoutError as error:
            if isinstance(error, ExecError):
                raise
            raise ExecError(f"the guest did not answer within {patience:g} s") from None

    def _drive(self, operation: op.Operation[T], deadline: Callable[[], float | None]) -> T:
        try:
            item = next(operation)  # refuses what it can before there is a connection
        except StopIteration as stop:
            value: T = stop.value
            return value
        channel = self._take()
        try:
            while True:
                try:
                    if item is None:
                        item = operation.send(channel.receive(deadline()))
                    else:
                        channel.send(item, deadline())
                        item = next(operation)
                except TimeoutError as error:
                    if isinstance(error, ExecError):
                        raise
                    item = operation.throw(error)
        except StopIteration as stop:
            self._give_back(channel)
            result: T = stop.value
            return result
        except BaseException:
            channel.close()
            operation.close()
            raise

    def _take(self) -> Channel:
        while True:
            with self._lock:
                channel = self._spare.pop() if self._spare else None
            if channel is None:
                break
            if channel.fresh:
                return channel
            channel.close()
        try:
            return Channel(self._connect())
        except TimeoutError as error:
            raise ExecError("cannot connect to the guest agent: it did not answer") from error
        except OSError as error:
            if isinstance(error, ExecError):
                raise
            reason = (error.strerror or str(error)).lower()
            raise ExecError(f"cannot connect to the guest agent: {reason}") from error

    def _give_back(self, channel: Channel) -> None:
        if not channel.closed and not self._closed:
            with self._lock:
                if len(self._spare) < _SPARE_CONNECTIONS:
                    self._spare.append(channel)
                    return
        channel.close()
