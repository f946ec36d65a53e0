"""The zygote: restore a template once, warm its guest up, and fork a worker whenever one is asked for.

    python -m microvm.workers.zygote CONFIG_FD SOCKET_FD MODE BOOT_TIMEOUT

``CONFIG_FD`` holds the machine's configuration. In mode "child" ``SOCKET_FD`` is one end of a pair: each message brings
a control socket for a new worker, and when the other end closes the zygote and its workers end. In mode "cold" it is
the control socket of a worker that boots its machine itself, in mode "restore:PATH" (or "frozen:") of one that restores
it from a snapshot. Any other mode is the path of a listening socket, renamed
from ``.new`` to ``.sock`` when the zygote is prepared: each connection is a control socket, and after a time without
any the zygote leaves.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ..agent.client import AgentClient
from ..agent.protocol import PORT, Ready
from ..errors import ExecError, SnapshotError
from ..machine.config import MachineConfig
from ..machine.machine import MicroVM
from . import template, wire
from .worker import Worker, die_with_parent

IDLE_S: Final = 300.0
"""A resident zygote leaves after so long without being asked: 20 MiB are not worth keeping for tomorrow."""

WARM_UP: Final = (
    ["/bin/sh", "-c", "true; /bin/true"],
    ["/bin/true"],
    ["/bin/sh", "-c", "command -v python3 >/dev/null && exec python3 -c 'print(1)'"],
    ["/bin/true"],
)
WARM_UP_TIMEOUT_S: Final = 20.0
_SETTLE_S: Final = 0.02  # for the guest to take notice of the connections that were closed


Program = Callable[[socket.socket, MicroVM, Ready], None]
"""What a resident zygote's workers run instead of `Worker`: gets the parked machine, and does not return."""


class Zygote:
    """A parked machine to fork from, or only modules and engine (``vm`` None) for machines that cannot be forked."""

    def __init__(
        self,
        config: MachineConfig,
        program: Program | None = None,
        boot_timeout_s: float = template.BOOT_TIMEOUT_S,
    ) -> None:
        self.config = config
        self.boot_timeout_s = boot_timeout_s
        self.program = program
        self.name = template.key(config)
        self.vm: MicroVM | None = None
        self.ready: Ready | None = None

    def prepare(self) -> None:
        """Make or find the template, restore it, run a few commands, and park. Raises what booting raises."""
        path = template.obtain(self.config, self.name, self.boot_timeout_s)
        try:
            vm, ready = template.restore(path)
        except SnapshotError:
            template.remove(path)  # of another build: make it anew, once
            vm, ready = template.restore(template.obtain(self.config, self.name, self.boot_timeout_s))
        self.ready = ready
        if not vm.can_fork:
            vm.close()
            return
        vm.start()
        with AgentClient(lambda: vm.vsock.connect(PORT, WARM_UP_TIMEOUT_S)) as client:
            client.renew()
            for command in WARM_UP:
                with contextlib.suppress(ExecError):
                    client.run(command, timeout=WARM_UP_TIMEOUT_S)
            process = client.start(["/bin/true"])
            process.wait()
            process.close()
        time.sleep(_SETTLE_S)
        vm.park()
        self.vm = vm

    def fork(self, control: socket.socket, options: wire.Message, others: list[socket.socket]) -> int:
        """Make a worker that serves ``control``. Returns its process id. Raises OSError."""
        if sys.platform == "win32":
            raise OSError(0, "this system cannot fork")
        pid = os.fork()
        if pid:
            return pid
        for other in others:
            os.close(other.detach())
        die_with_parent()
        gc.enable()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        self._become(control, options)
        os._exit(1)

    def _become(self, control: socket.socket, options: wire.Message) -> None:
        frozen = bool(options.get("frozen_clock"))
        if self.program is not None and self.vm is not None and self.ready is not None:
            self.program(control, self.vm, self.ready)
        if self.vm is not None and self.ready is not None:
            Worker(control, self.vm, self.ready).run(forked=True, frozen_clock=frozen)
        try:
            vm, ready = template.restore(template.obtain(self.config, self.name))
        except BaseException as error:  # noqa: BLE001 - the owner raises it
            wire.send(control, {"failed": wire.pack_error(error)})
            os._exit(1)
        Worker(control, vm, ready).run(forked=False, frozen_clock=frozen)


def serve_child(zygote: Zygote, mother: socket.socket) -> None:
    """Fork for each control socket that comes, until the other end is closed."""
    while True:
        try:
            options, fds = wire.receive(mother)
        except (EOFError, ConnectionError):
            return
        for fd in fds:
            with socket.socket(fileno=fd) as control:
                _fork_or_say(zygote, control, options, [mother])


def serve_resident(zygote: Zygote, listener: socket.socket, idle_s: float) -> None:
    """Fork for each connection of this user, until there was none for a while and no worker is left."""
    children: set[int] = set()
    if sys.platform == "win32":
        return
    while True:
        ready, _, _ = select.select([listener], [], [], idle_s)
        for pid in list(children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            children.discard(pid)
        if not ready:
            if not children:
                return
            continue
        try:
            control, _ = listener.accept()
        except OSError:
            continue
        with control:
            if _peer_uid(control) == os.getuid():
                pid = _fork_or_say(zygote, control, {}, [listener])
                if pid:
                    children.add(pid)


def _fork_or_say(zygote: Zygote, control: socket.socket, options: wire.Message, others: list[socket.socket]) -> int:
    try:
        return zygote.fork(control, options, others)
    except OSError as error:
        with contextlib.suppress(OSError):
            wire.send(control, {"failed": wire.pack_error(error)})
        return 0


def _peer_uid(sock: socket.socket) -> int:
    if sys.platform != "linux":
        return -1
    import struct

    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])


def main(arguments: list[str], program: Program | None = None) -> int:
    """The process. Returns its exit code."""
    config_fd, socket_fd, mode = int(arguments[0]), int(arguments[1]), arguments[2]
    boot_timeout_s = float(arguments[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever owns us; the end of its socket is for us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with socket.socket(fileno=socket_fd) as sock:
        if mode == "child" and sys.platform != "win32":
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        with open(config_fd, "rb") as file:
            file.seek(0)
            config = template.unpack_config(file.read())
        if mode == "cold":
            die_with_parent()
            return _cold(config, sock, boot_timeout_s)
        kind, colon, path = mode.partition(":")
        if colon:
            die_with_parent()
            return _restored(Path(path), sock, kind == "frozen")
        try:
            zygote = Zygote(config, program, boot_timeout_s)
            zygote.prepare()
        except Exception as error:  # noqa: BLE001 - told to whoever asks, where it is raised
            if mode == "child":
                with contextlib.suppress(OSError):
                    wire.send(sock, {"failed": wire.pack_error(error)})
            return 1
        gc.collect()
        gc.freeze()  # so that the collector does not write to pages shared with every worker
        gc.disable()
        if mode == "child":
            with contextlib.suppress(OSError):
                wire.send(sock, {"prepared": True})
            serve_child(zygote, sock)
        else:
            if program is not None and zygote.vm is None:
                return 0  # a machine that cannot be forked: there is nothing to be resident for
            bound = Path(mode)
            bound.rename(bound.with_suffix(".sock"))
            serve_resident(zygote, sock, float(os.environ.get("MICROVM_IDLE_S") or IDLE_S))
            bound.with_suffix(".sock").unlink(missing_ok=True)
    os._exit(0)


def _restored(path: Path, control: socket.socket, frozen_clock: bool) -> int:
    try:
        vm, ready = template.restore(path)
    except Exception as error:  # noqa: BLE001 - told to the owner, where it is raised
        with contextlib.suppress(OSError):
            wire.send(control, {"failed": wire.pack_error(error)})
        os._exit(1)
    Worker(control, vm, ready).run(forked=False, frozen_clock=frozen_clock)


def _cold(config: MachineConfig, control: socket.socket, boot_timeout_s: float) -> int:
    try:
        vm = MicroVM(config)
        client, ready = template.boot(vm, boot_timeout_s)
    except Exception as error:  # noqa: BLE001 - told to the owner, where it is raised
        with contextlib.suppress(OSError):
            wire.send(control, {"failed": wire.pack_error(error)})
        os._exit(1)
    client.close()
    Worker(control, vm, ready).run(forked=False, booted=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
