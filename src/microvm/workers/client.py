"""The owner's side of workers: asking for them, and a worker as the machine of a sandbox."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

from ..agent.protocol import Ready
from ..errors import ExecError, HostError, InternalError, MicroVMError, StateError, WorkerError
from ..machine.config import MachineConfig
from ..machine.outcome import End, Outcome
from . import template, wire

PREPARE_SLACK_S: Final = 60.0  # beyond booting the template of the first sandbox of a kind
REQUEST_TIMEOUT_S: Final = 60.0
RESIDENT_TIMEOUT_S: Final = 5.0


def supported() -> bool:
    """Whether this system has what workers need: fork, and descriptors passed over sockets."""
    return sys.platform == "linux"


class WorkerMachine:
    """A machine in a worker: a `SandboxMachine`. Any thread.

    ``control`` is the owner's end of its control socket and becomes ours.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lock = threading.Lock()  # one request at a time
        self._pidfd = -1
        self._answers: list[tuple[wire.Message, list[int]]] = []
        self._outcome: Outcome | None = None
        self._bug: str | None = None
        self._tail = b""
        self._lost = False
        self._closed = False
        self.pid = 0
        self.backend = ""
        self.process: Any = None  # of a worker that is our own child

    def boot(self, timeout_s: float) -> tuple[socket.socket, Ready | None]:
        """Wait until the guest takes commands. Raises TimeoutError, WorkerError, and what booting raises."""
        with self._lock:
            self._control.settimeout(timeout_s)
            try:
                message, fds = wire.receive(self._control)
            except TimeoutError:
                raise TimeoutError(f"the worker was not ready within {timeout_s:g} s") from None
            except (EOFError, OSError) as error:
                raise self._died() from error
            if "ready" not in message:
                wire.close_all(fds)
                raise wire.unpack_error(message.get("failed") or {})
            stream, self._pidfd = fds
            self.pid, self.backend = message["pid"], message["backend"]
            return socket.socket(fileno=stream), Ready(*message["ready"])

    def connect(self) -> socket.socket:
        """See `SandboxMachine.connect`."""
        try:
            _, fds = self._request({"op": "connect"})
        except (WorkerError, ExecError):
            raise
        except (MicroVMError, TimeoutError, ConnectionError) as error:
            raise ExecError(f"cannot connect to the guest: {error}") from None
        return socket.socket(fileno=fds[0])

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """See `SandboxMachine.wait`. Raises WorkerError if the process died instead of the guest."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._ending() is not None:
                    return self._ending()
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                self._collect(0.05 if left is None else min(left, 0.05))
                if self._ending() is not None:
                    return self._ending()
            if left == 0.0:
                return None

    def console_tail(self) -> bytes:
        """See `SandboxMachine.console_tail`."""
        if not self._tail and not self._lost:
            with contextlib.suppress(ExecError, StateError):
                self._tail = str(self._request({"op": "tail"})[0]["tail"]).encode("latin-1")
        return self._tail

    def fork(self, count: int, frozen_clock: bool = False) -> tuple[list[WorkerMachine | Exception], float]:
        """Copies of this worker, still to be booted, or why there is none; and how long ours stood still."""
        ends = [wire.pair() for _ in range(count)]
        theirs = [end.fileno() for _, end in ends]
        machines: list[WorkerMachine | Exception] = [WorkerMachine(end) for end, _ in ends]
        try:
            answer, _ = self._request({"op": "fork", "frozen_clock": frozen_clock}, theirs)
        except BaseException:
            for machine in machines:
                assert isinstance(machine, WorkerMachine)
                machine.close()
            raise
        finally:
            for _, end in ends:
                end.close()
        for index, failure in enumerate(answer["failures"]):
            if failure is not None:
                machine = machines[index]
                assert isinstance(machine, WorkerMachine)
                machine.close()
                machines[index] = HostError("fork", 0, f"the worker cannot be copied: {failure}")
        return machines, float(answer["paused_s"])

    def perform(self, operation: str, **arguments: Any) -> wire.Message:
        """Another request: see `worker.Worker`."""
        return self._request({"op": operation, **arguments})[0]

    def close(self) -> None:
        """End the process, guest and all, at once. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._pidfd >= 0 and sys.platform == "linux":
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
            self._pidfd = -1
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _request(self, message: wire.Message, fds: list[int] | None = None) -> tuple[wire.Message, list[int]]:
        with self._lock:
            if self._closed:
                raise StateError("the sandbox is closed")
            try:
                wire.send(self._control, message, fds)
            except OSError as error:
                self._collect(0)
                raise self._died() from error
            deadline = time.monotonic() + REQUEST_TIMEOUT_S
            while not self._answers:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ExecError("the worker did not answer")
                self._collect(left)
                if self._lost and not self._answers:
                    raise self._died()
            answer, received = self._answers.pop()
        if "error" in answer:
            wire.close_all(received)
            raise wire.unpack_error(answer["error"])
        return answer, received

    def _collect(self, timeout_s: float) -> None:
        """Take in what the worker says within the time, at least one message. With the lock."""
        if self._closed or self._lost or sys.platform == "win32":
            return
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            return
        try:
            message, fds = wire.receive(self._control)
        except (EOFError, OSError):
            self._lost = True
            return
        if "answer" in message:
            self._answers.append((message["answer"], fds))
            return
        wire.close_all(fds)
        if "ended" in message:
            kind, detail = message["ended"] or (End.CRASHED, "")
            self._outcome, self._bug = Outcome(kind, detail), message.get("error")
            self._tail = str(message.get("tail", "")).encode("latin-1")

    def _ending(self) -> Outcome | None:
        if self._bug is not None:
            raise InternalError(self._bug)
        if self._outcome is None and self._lost and not self._closed:
            raise self._died()
        return self._outcome

    def _died(self) -> WorkerError:
        return WorkerError(f"the sandbox's process{f' {self.pid}' if self.pid else ''} ended unexpectedly")


def cold_worker(config: MachineConfig, boot_timeout_s: float = template.BOOT_TIMEOUT_S) -> WorkerMachine:
    """A worker that boots its machine itself, in a fresh process. It waits for nobody and dies with this one."""
    ours, theirs = wire.pair()
    with theirs:
        machine = WorkerMachine(ours)
        machine.process = _spawn(config, theirs, "cold", boot_timeout_s=boot_timeout_s)
    return machine


def restored_worker(config: MachineConfig, path: Path, frozen_clock: bool = False) -> WorkerMachine:
    """A worker, in a fresh process, with the machine from a snapshot."""
    ours, theirs = wire.pair()
    with theirs:
        machine = WorkerMachine(ours)
        mode = f"{'frozen' if frozen_clock else 'restore'}:{path.absolute()}"
        machine.process = _spawn(config, theirs, mode)
    return machine


class ZygoteProcess:
    """A zygote of this process, started now; its first worker waits until it is prepared. Any thread."""

    def __init__(self, config: MachineConfig, boot_timeout_s: float = template.BOOT_TIMEOUT_S) -> None:
        ours, theirs = wire.pair()
        self._patience = 2 * boot_timeout_s + PREPARE_SLACK_S
        self._sock = ours
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._prepared = False
        self._owner = os.getpid()
        with theirs:
            self._process = _spawn(config, theirs, "child", boot_timeout_s=boot_timeout_s)

    def worker(self, frozen_clock: bool = False) -> WorkerMachine:
        """A new worker, not yet ready. Raises what preparing the zygote raised, WorkerError if it is gone."""
        with self._lock:
            if not self._prepared:
                self._wait_prepared()
            ours, theirs = wire.pair()
            try:
                with theirs:
                    wire.send(self._sock, {"frozen_clock": frozen_clock}, [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise WorkerError("the process that sandboxes are copied from has ended") from error
            return WorkerMachine(ours)

    def _wait_prepared(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._sock.settimeout(self._patience)
        try:
            message, _ = wire.receive(self._sock)
            if "prepared" not in message:
                self._failure = wire.unpack_error(message.get("failed") or {})
                raise self._failure
            self._prepared = True
        except (EOFError, OSError) as error:
            if self._failure is error:
                raise
            raise WorkerError("the process that sandboxes are copied from ended while it was prepared") from error

    @property
    def alive(self) -> bool:
        """Whether more workers can come from it."""
        return self._owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """End it, and with it every worker it made. Idempotent."""
        self._sock.close()
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()


def _spawn(
    config: MachineConfig,
    sock: socket.socket,
    mode: str,
    module: str = "microvm.workers.zygote",
    boot_timeout_s: float = template.BOOT_TIMEOUT_S,
) -> Any:
    import subprocess

    if sys.platform != "linux":
        raise StateError("workers need Linux")
    fd = os.memfd_create("microvm-config", os.MFD_CLOEXEC)
    spare = [fd]
    try:
        handed = []
        for one in (fd, sock.fileno()):
            if one < 3:  # in a process with closed standard streams; the child's own go there
                import fcntl

                one = fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 3)
                spare.append(one)
            handed.append(one)
        os.write(fd, template.pack_config(config))
        number, sock_number = handed
        environment = dict(os.environ)
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", module, str(number), str(sock_number), mode, str(boot_timeout_s)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("MICROVM_DEBUG") == "1" else subprocess.DEVNULL,
            pass_fds=handed,
            start_new_session=True,  # a terminal's Ctrl-C is for the commands in the guests, which get it from us
            cwd="/",
            env=environment,
        )
    finally:
        wire.close_all(spare)


_zygotes: dict[str, ZygoteProcess] = {}
_zygotes_lock = threading.Lock()


def worker(
    config: MachineConfig, frozen_clock: bool = False, boot_timeout_s: float = template.BOOT_TIMEOUT_S
) -> WorkerMachine:
    """A worker with a machine of this configuration, which names its backend, restored from its template."""
    name = template.key(config)
    with _zygotes_lock:
        zygote = _zygotes.get(name)
        if zygote is not None and not zygote.alive:
            del _zygotes[name]
            zygote.close()
            zygote = None
        if zygote is None:
            zygote = _zygotes[name] = ZygoteProcess(config, boot_timeout_s)
    try:
        return zygote.worker(frozen_clock)
    except Exception:
        with _zygotes_lock:
            if _zygotes.get(name) is zygote:
                del _zygotes[name]
        zygote.close()
        raise


@atexit.register
def close_zygotes() -> None:
    """End every zygote of this process, and with them its sandboxes."""
    with _zygotes_lock:
        found = list(_zygotes.values())
        _zygotes.clear()
    for zygote in found:
        if zygote.alive:
            zygote.close()


if hasattr(os, "register_at_fork"):
    # A forked child that is not ours must not end its parent's zygotes, nor ask them.
    os.register_at_fork(after_in_child=_zygotes.clear)


# The resident zygote of the command line.


def runtime_directory() -> Path:
    """Where sockets of this user are: nobody else may enter."""
    if sys.platform == "win32":
        raise StateError("workers need Linux")
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "microvm" if base else Path(f"/tmp/microvm-{os.getuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HostError("mkdir", 0, f"{path} is not this user's alone")
    return path


def start_resident(config: MachineConfig, module: str) -> None:
    """Start ``module`` as a resident zygote for this machine in the background, unless one is on its way.

    Returns at once. The module's main hands its arguments to `zygote.main`.
    """
    if sys.platform != "linux":
        return
    name = template.key(config)
    path = runtime_directory() / f"{name}.new"  # renamed when it is prepared
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()  # left by one that died
        else:
            return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(str(path))
        except OSError:
            return  # another process was first
        listener.listen(64)
        _spawn(config, listener, str(path), module)
