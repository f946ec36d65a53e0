"""What runs in a worker: one machine, and its owner's requests on a control socket.

The control socket is the worker's life: when the owner closes it, or dies, the worker ends at once, guest and all. The
main thread does nothing but serve it, so the end is always noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from typing import Final, NoReturn

from ..agent.client import AgentClient
from ..agent.protocol import PORT, Ready
from ..errors import InternalError, MicroVMError, StateError
from ..machine.machine import MicroVM
from . import template, wire

RENEW_TIMEOUT_S: Final = 30.0
TAIL_BYTES: Final = 4096
MAX_FORKS: Final = wire.MAX_FDS
_PR_SET_PDEATHSIG: Final = 1
_EXIT_FAILED: Final = 70


class Worker:
    """Serves one machine on one control socket. `run` does not return."""

    def __init__(self, control: socket.socket, vm: MicroVM, ready: Ready) -> None:
        self.control = control
        self.vm = vm
        self.ready = ready
        self._sending = threading.Lock()

    def run(self, *, forked: bool, frozen_clock: bool = False, booted: bool = False) -> NoReturn:
        """Let the machine go on, tell the owner, and serve until the owner is gone."""
        code = 0
        try:
            self._begin(forked, frozen_clock, booted)
            self._serve()
        except (EOFError, ConnectionError):
            pass
        except BaseException as error:  # noqa: BLE001 - the owner raises it
            code = _EXIT_FAILED
            with contextlib.suppress(OSError):
                self._send({"failed": wire.pack_error(error)})
        finally:
            os._exit(code)  # the guest ends with its process; nothing is left to tidy up

    def _begin(self, forked: bool, frozen_clock: bool, booted: bool) -> None:
        self.vm.on_end(self._ended)
        if forked:
            self.vm.forked()
            self.vm.unpark()
        elif not booted:
            self.vm.start()
        stream = self.vm.vsock.connect(PORT, RENEW_TIMEOUT_S)
        with AgentClient(lambda: stream, RENEW_TIMEOUT_S) as client:
            if not booted:
                client.renew(frozen_clock=frozen_clock)
            self.announce(stream)

    def announce(self, stream: socket.socket) -> None:
        """Tell the owner that the guest takes commands, and give it a connection and a handle on this process."""
        ready = self.ready
        message = {
            "ready": [ready.version, ready.port, ready.started_ns, ready.ready_ns, ready.kernel, ready.error],
            "backend": self.vm.backend,
            "pid": os.getpid(),
        }
        if sys.platform == "linux":
            pidfd = os.pidfd_open(os.getpid())
            self._send(message, [stream.fileno(), pidfd])
            os.close(pidfd)

    def _send(self, message: wire.Message, fds: list[int] | None = None) -> None:
        with self._sending:
            wire.send(self.control, message, fds)

    def _ended(self) -> None:
        """On a thread of the machine: the guest has ended."""
        outcome, error = self.vm.ending
        with contextlib.suppress(OSError):
            self._send(
                {
                    "ended": [outcome.kind, outcome.detail] if outcome is not None else None,
                    "error": None if error is None else str(error),
                    "tail": self._tail(),
                }
            )

    def _tail(self) -> str:
        return self.vm.serial.tail(TAIL_BYTES).decode("latin-1")

    def _serve(self) -> None:
        while True:
            message, fds = wire.receive(self.control)
            operation = message.get("op")
            try:
                if operation == "connect":
                    # On a thread: a guest that does not answer must not keep this one from noticing the owner's end.
                    threading.Thread(target=self._connect, daemon=True).start()
                    continue
                answer = self._perform(str(operation), message, fds)
            except MicroVMError as error:
                answer = {"error": wire.pack_error(error)}
            finally:
                wire.close_all(fds)
            self._send({"answer": answer})

    def _connect(self) -> None:
        try:
            with self.vm.vsock.connect(PORT, template.CONNECT_TIMEOUT_S) as stream:
                self._send({"answer": {}}, [stream.fileno()])
        except (MicroVMError, OSError) as error:
            with contextlib.suppress(OSError):
                self._send({"answer": {"error": wire.pack_error(error)}})

    def _perform(self, operation: str, message: wire.Message, fds: list[int]) -> wire.Message:
        if operation == "tail":
            return {"tail": self._tail()}
        if operation == "fork":
            return self._fork(fds, bool(message.get("frozen_clock")))
        if operation == "snapshot":
            name = self.vm.snapshot(
                str(message["path"]), difference=bool(message.get("difference")), note=dict(message.get("note") or {})
            )
            return {"id": name}
        if operation == "balloon":
            self.vm.set_balloon(int(message["mib"]))
            return {}
        if operation == "stats":
            return {"stats": self.vm.stats()}
        if operation == "pause":
            self.vm.pause()
            return {}
        if operation == "resume":
            self.vm.resume()
            return {}
        raise InternalError(f"a worker was asked for {operation!r}")

    def _fork(self, fds: list[int], frozen_clock: bool) -> wire.Message:
        """A copy of this process for each control socket in ``fds``; its guest is a copy of ours."""
        import time

        if sys.platform == "win32":
            raise StateError("this system cannot fork")
        if threading.active_count() > 1 + self.vm.thread_count:
            raise StateError("the sandbox is being connected to")
        begin = time.perf_counter()
        self.vm.park()
        failures: list[str | None] = []
        try:
            for fd in fds:
                try:
                    pid = os.fork()
                except OSError as error:
                    failures.append(error.strerror or str(error))
                    continue
                if pid == 0:
                    os.close(self.control.detach())
                    control = socket.socket(fileno=fd)
                    wire.close_all([other for other in fds if other != fd])
                    Worker(control, self.vm, self.ready).run(forked=True, frozen_clock=frozen_clock)
                failures.append(None)
        finally:
            self.vm.unpark()
        return {"failures": failures, "paused_s": time.perf_counter() - begin}


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that made it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
