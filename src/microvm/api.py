"""`Sandbox`: a Linux guest to run commands in, as easily as a subprocess.

    with Sandbox() as sandbox:
        result = sandbox.run(["python3", "-c", "print(6 * 7)"])
        print(result.stdout_text)

A sandbox is a machine that boots a kernel, the guest agent as its initial ramdisk and an image as its read-only root
with a writable overlay in memory. What is asked of it goes to the agent over vsock. It knows the machine only as a
`SandboxMachine`, so that a machine may as well live in another process.
"""

from __future__ import annotations

import copy
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, Self, TypedDict

from .agent.client import DEVNULL, PIPE, STDOUT, AgentClient
from .agent.files import Files
from .agent.operations import Result
from .agent.process import Process
from .agent.protocol import PORT, FileInfo, GuestInfo, GuestPath, Ready, Text
from .errors import BootError, CommandFailed, ConfigError, ExecError, ExecTimeout, MicroVMError, StateError, WorkerError
from .machine.config import DiskConfig, MachineConfig
from .machine.outcome import End

if TYPE_CHECKING:
    from types import TracebackType

    from .checkpoints import Checkpoint
    from .machine.machine import MicroVM
    from .machine.outcome import Outcome

__all__ = ["DEVNULL", "PIPE", "STDOUT", "FileInfo", "Files", "GuestInfo", "Process", "Result", "Sandbox"]

ROOT_DISK: Final = "/dev/vda"
BASE_CMDLINE: Final = "console=ttyS0 quiet loglevel=0 reboot=t panic=-1 cryptomgr.notests"
BOOT_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 30.0
SHUTDOWN_TIMEOUT_S: Final = 15.0
MAX_FORKS: Final = 64  # at one time
TAIL_BYTES: Final = 4096

Command = str | Sequence[Text]


class _ExecOptions(TypedDict):
    env: Mapping[str, str]
    cwd: GuestPath | None
    user: str | None
    timeout: float | None


class SandboxMachine(Protocol):
    """All a sandbox needs of a machine. Any thread."""

    @property
    def backend(self) -> str:
        """The name of the backend that runs it."""

    def boot(self, timeout_s: float) -> tuple[socket.socket, Ready | None]:
        """Start, and return a connection to the agent, and what it said when it was ready.

        None instead means that the agent will say so on the connection.

        Raises TimeoutError, or ConnectionError if the guest ends before.
        """

    def connect(self) -> socket.socket:
        """A connection to the agent."""

    def wait(self, timeout_s: float | None) -> Outcome | None:
        """Wait for the guest's end. Raises InternalError if that was a bug of ours."""

    def console_tail(self) -> bytes:
        """The last of what the guest printed."""

    def close(self) -> None:
        """End the guest and free everything. Idempotent."""


class Sandbox:
    """A Linux guest to run commands in. Methods may be called from any thread.

    ``image``: a name of ``microvm image list`` or an erofs file. ``kernel``: a name of ``microvm kernel list`` or a
    file; by default the best one there. ``memory_mib``: even, from 64. ``cpus``: 1 to 32. ``backend``: "auto" or a
    backend's name. ``env``, ``workdir``, ``user`` and ``timeout`` (seconds) are defaults for the commands. ``disks``
    are raw images that the guest sees from /dev/vdb on. ``cmdline`` is added to the kernel's command line.

    The guest is restored from a template that the first sandbox of its kind leaves behind, unless ``cold``; with
    ``frozen_clock`` its clock stays where the template's stood. Its machine runs in a process of its own unless
    ``isolated`` is False: a crash there is a WorkerError here.

    Entering the ``with`` block, or `boot`, starts it. Leaving the block ends it at once; with writable disks it is shut
    down in order, so that nothing written is lost. Raises ConfigError for what cannot be.
    """

    def __init__(
        self,
        image: str | os.PathLike[str] = "python",
        *,
        kernel: str | os.PathLike[str] | None = None,
        memory_mib: int = 256,
        cpus: int = 1,
        backend: str = "auto",
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        disks: Sequence[DiskConfig | str | os.PathLike[str]] = (),
        cmdline: str = "",
        boot_timeout: float = BOOT_TIMEOUT_S,
        cold: bool = False,
        isolated: bool = True,
        frozen_clock: bool = False,
        _given: tuple[MicroVM, Ready] | None = None,
        _config: MachineConfig | None = None,
    ) -> None:
        extra = [disk if isinstance(disk, DiskConfig) else DiskConfig(Path(disk)) for disk in disks]
        # A machine that is given stands parked in this process, which was forked for it.
        self._given = _given
        if _given is not None:
            _config = _given[0].config
        self._config = _config or _configure(image, kernel, memory_mib, cpus, backend, extra, cmdline)
        self._snapshot: Path | None = None
        self.last_checkpoint: str | None = None
        self._writable = any(not disk.read_only for disk in extra)
        self._env = dict(env or {})
        self._workdir = workdir
        self._user = user
        self._timeout = timeout
        self._boot_timeout = boot_timeout
        self._cold = cold or bool(extra)
        self._isolated = isolated
        self._frozen_clock = frozen_clock
        self._lock = threading.Lock()
        self._machine: SandboxMachine | None = None
        self._client: AgentClient | None = None
        self._closed = False
        self._listeners: list[Callable[[bytes], None]] = []
        self.ready: Ready | None = None
        self.boot_seconds = 0.0
        self.fork_pause_seconds = 0.0

    def __enter__(self) -> Self:
        if self._client is None:
            self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._writable and not self._closed:
            try:
                self.shutdown()
            except ExecError:
                pass  # a guest that is gone has nothing left to write
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "new" if self._client is None else "running"
        return f"<Sandbox {state}, {self._config.memory_mib} MiB, {self._config.cpus} vCPU>"

    @property
    def vm(self) -> MicroVM:
        """The machine below: consoles, pause and resume, counters.

        Raises StateError before `boot`, and for a sandbox in a process of its own.
        """
        if self._machine is None:
            raise StateError("the sandbox has not been booted")
        if not isinstance(self._machine, _LocalMachine):
            raise StateError("the machine is in another process: make the sandbox with isolated=False to reach it")
        return self._machine.vm

    @property
    def backend(self) -> str:
        """The name of the backend that runs it. Raises StateError before `boot`."""
        if self._machine is None:
            raise StateError("the sandbox has not been booted")
        return self._machine.backend

    @property
    def closed(self) -> bool:
        """Whether it is over, by `close` or because it did not come up."""
        return self._closed

    @property
    def has_writable_disks(self) -> bool:
        """Whether the guest was given disks of its own that it can write."""
        return self._writable

    @property
    def files(self) -> Files:
        """The guest's files: read, write, list, put, get and more."""
        return self._agent().files

    def on_console(self, listener: Callable[[bytes], None]) -> None:
        """Call ``listener`` with what the guest prints on its console, on a thread of the machine. Before `boot`."""
        self._listeners.append(listener)

    def boot(self) -> Ready:
        """Start the guest and wait until it can run commands. Returns what the agent said of itself.

        Raises StateError if used before, BackendUnavailable, BootError with the end of the console's output if the
        guest does not come up. After an error the sandbox is closed.
        """
        with self._lock:
            if self._closed or self._machine is not None:
                raise StateError("the sandbox has been booted before")
            begin = time.monotonic()
            try:
                self._machine = self._make_machine()
                self.ready = self._wait_ready(self._machine)
            except BaseException:
                if self._machine is not None:
                    self._machine.close()
                self._closed = True
                raise
            self.boot_seconds = time.monotonic() - begin
            return self.ready

    def run(
        self,
        command: Command,
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: GuestPath | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        stdout: int = PIPE,
        stderr: int = PIPE,
        max_output: int = 64 << 20,
    ) -> Result:
        """Run a command, wait for its end and return its output and exit code (negative: the signal that ended it).

        A list is run as it is, a string by ``/bin/sh -c``. ``env`` adds to the guest's environment. ``timeout`` in
        seconds ends the command with all it started. ``stderr=STDOUT`` merges the streams.

        Raises ExecTimeout with the output so far, CommandFailed with ``check``, and ExecError if it cannot be started,
        if the guest ends meanwhile or if a stream is longer than ``max_output`` bytes.
        """
        client = self._agent()
        data = input.encode() if isinstance(input, str) else input
        options = self._defaults(env, cwd, user, timeout)
        try:
            return client.run(
                _words(command),
                input=data,
                check=check,
                stdout=stdout,
                stderr=stderr,
                max_output=max_output,
                **options,
            )
        except (ExecTimeout, CommandFailed):
            raise
        except ExecError as error:
            raise self._explain(error) from error.__cause__

    def start(
        self,
        command: Command,
        *,
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        pty: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: GuestPath | None = None,
        user: str | None = None,
        timeout: float | None = None,
        leave_running: bool = False,
    ) -> Process:
        """Start a command and return it running, in the manner of ``subprocess.Popen``.

        ``pty``: rows and columns of a terminal for it; ``leave_running`` keeps alive what it leaves behind; the rest as
        for `run`. Raises ExecError if it cannot start.
        """
        client = self._agent()
        options = self._defaults(env, cwd, user, timeout)
        try:
            return client.start(
                _words(command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pty=pty,
                leave_running=leave_running,
                **options,
            )
        except ExecError as error:
            raise self._explain(error) from error.__cause__

    def info(self) -> GuestInfo:
        """The guest's uptime, clock, memory and load."""
        return self._agent().info()

    def ping(self, timeout: float | None = None) -> float:
        """Ask the guest for a sign of life. Returns the seconds it took. Raises ExecError."""
        return self._agent().ping(timeout)

    def shutdown(self, timeout: float = SHUTDOWN_TIMEOUT_S) -> Outcome | None:
        """End the guest in good order: its processes are asked to end, its disks are written. Then free everything.

        Returns how it ended; a guest that takes longer than ``timeout`` seconds is cut off, and None returned.
        """
        client, machine = self._agent(), self._machine
        assert machine is not None
        try:
            try:
                client.shutdown(grace_s=min(2.0, timeout / 2))
            except ExecError:
                # A guest with nothing to end can be gone before its answer is on the way. Is it gone?
                outcome = machine.wait(min(1.0, timeout))
                if outcome is None or outcome.kind not in (End.POWERED_OFF, End.RESET):
                    raise
                return outcome
            return machine.wait(timeout)
        finally:
            self.close()

    def close(self) -> None:
        """End the guest at once and free everything: threads, descriptors, memory. Idempotent."""
        with self._lock:
            self._closed = True
            if self._client is not None:
                self._client.close()
            if self._machine is not None:
                self._machine.close()

    def _defaults(
        self, env: Mapping[str, str] | None, cwd: GuestPath | None, user: str | None, timeout: float | None
    ) -> _ExecOptions:
        """What a command is given, with the sandbox's own settings where it has none."""
        return {
            "env": {**self._env, **(env or {})},
            "cwd": self._workdir if cwd is None else cwd,
            "user": self._user if user is None else user,
            "timeout": self._timeout if timeout is None else timeout,
        }

    def _agent(self) -> AgentClient:
        if self._closed:
            raise StateError("the sandbox is closed")
        if self._client is None:
            raise StateError('the sandbox has not been booted: use "with", or boot()')
        return self._client

    def _make_machine(self) -> SandboxMachine:
        if self._given is not None:
            return _LocalMachine(self._config, (), given=self._given)
        from .workers import client, template

        if self._snapshot is not None:
            if self._isolated and client.supported():
                return client.restored_worker(self._config, self._snapshot, self._frozen_clock)
            return _LocalMachine(
                self._config, restored=template.restore(self._snapshot), frozen_clock=self._frozen_clock
            )
        self._config.check_files()  # a wrong file name is answered before backends are probed
        config = template.decide(self._config)
        if self._listeners or not self._isolated or not client.supported():
            return _LocalMachine(config, self._listeners, self._cold, self._frozen_clock)
        if self._cold:
            return client.cold_worker(config, self._boot_timeout)
        return client.worker(config, self._frozen_clock, self._boot_timeout)

    @property
    def config(self) -> MachineConfig:
        """What its machine is made of."""
        return self._config

    def fork(self, count: int = 1) -> list[Sandbox | Exception]:
        """Copies of this sandbox as it is now: files, memory, running processes; each with an identity of its own.

        It stands still for some milliseconds meanwhile and shares its memory with the copies until one writes. What
        the host follows (commands of `start`, connections) goes on here only. Each copy is booted and must be closed;
        one that could not be made is its exception instead. Raises StateError for a sandbox that cannot be copied.
        """
        from .workers.client import WorkerMachine

        self._agent()
        machine = self._machine
        if not isinstance(machine, WorkerMachine):
            raise StateError("only a sandbox in a process of its own can be copied")
        if not 1 <= count <= MAX_FORKS:
            raise ConfigError("count", count, f"must be 1 to {MAX_FORKS}")
        children, self.fork_pause_seconds = machine.fork(count, self._frozen_clock)
        return [child if isinstance(child, Exception) else self._child(child) for child in children]

    def _child(self, machine: SandboxMachine) -> Sandbox | Exception:
        child = copy.copy(self)
        child._lock = threading.Lock()
        child._machine, child._client = machine, None
        try:
            child.ready = child._wait_ready(machine)
        except Exception as error:  # noqa: BLE001 - returned, as promised
            machine.close()
            child._closed = True
            return error
        return child

    @classmethod
    def from_snapshot(
        cls,
        path: str | os.PathLike[str],
        *,
        isolated: bool = True,
        frozen_clock: bool = False,
        timeout: float | None = None,
    ) -> Self:
        """A sandbox that goes on from what `snapshot` saved, as a machine of its own. Not booted yet.

        Raises SnapshotError.
        """
        from .workers import template

        config, _, identity = template.describe(Path(path))
        sandbox = cls(isolated=isolated, frozen_clock=frozen_clock, timeout=timeout, _config=config)
        sandbox._snapshot = Path(path)
        sandbox.last_checkpoint = identity
        return sandbox

    def snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        difference_in: str | os.PathLike[str] | None = None,
        after: str | None = None,
    ) -> None:
        """Save the running sandbox into the file ``path``; see `MicroVM.snapshot`. It goes on afterwards.

        ``difference_in``: save a difference if the snapshot it was restored from lies in this directory. ``after`` is
        noted in it: the id of the checkpoint that this one follows.
        """
        from .workers.client import WorkerMachine

        self._agent()
        note = {"ready": list(astuple(self.ready)) if self.ready is not None else None, "after": after}
        source = self._snapshot
        difference = (
            source is not None
            and difference_in is not None
            and source.parent.absolute() == Path(difference_in).absolute()
            and source.exists()
        )
        if isinstance(self._machine, WorkerMachine):
            self._machine.perform("snapshot", path=os.path.abspath(path), note=note, difference=difference)
        else:
            self.vm.snapshot(path, note=note, difference=difference)

    def checkpoint(self, name: str) -> Checkpoint:
        """Save this moment under a name, with memory and processes, and go on. See `microvm.checkpoints`.

        Raises ConfigError if the name is taken or cannot be one.
        """
        from .checkpoints import create

        return create(self, name)

    def _wait_ready(self, machine: SandboxMachine) -> Ready:
        deadline = time.monotonic() + self._boot_timeout
        client = AgentClient(machine.connect)
        try:
            sock, known = machine.boot(self._boot_timeout)
            if known is None:
                ready = client.wait_ready(sock, max(0.0, deadline - time.monotonic()))
            else:
                ready = known
                client.adopt(sock)
        except WorkerError:
            raise
        except TimeoutError:
            raise BootError(
                f"the guest was not ready within {self._boot_timeout:g} s{_tail(machine.console_tail())}"
            ) from None
        except (ConnectionError, ExecError):
            outcome = machine.wait(1.0)
            how = f"the guest ended while it booted: {outcome}" if outcome else "the guest agent ended"
            raise BootError(f"{how}{_tail(machine.console_tail())}") from None
        self._client = client
        return ready

    def _explain(self, error: ExecError) -> ExecError:
        """A lost connection means more if the guest has ended. Raises InternalError if that was a bug of ours."""
        machine = self._machine
        if error.code or machine is None or self._closed:
            return error
        try:
            outcome = machine.wait(0.2 if "connection" in str(error) else 0)
        except StateError:
            return error
        return error if outcome is None else ExecError(f"the guest ended: {outcome}{_tail(machine.console_tail())}")


class _LocalMachine:
    """A `SandboxMachine` in this process."""

    def __init__(
        self,
        config: MachineConfig,
        listeners: Sequence[Callable[[bytes], None]] = (),
        cold: bool = False,
        frozen_clock: bool = False,
        given: tuple[MicroVM, Ready] | None = None,
        restored: tuple[MicroVM, Ready] | None = None,
    ) -> None:
        from .machine.machine import MicroVM

        self._parked = given is not None
        self._ready: Ready | None = None
        self._frozen_clock = frozen_clock
        warm = given or restored or (None if cold or listeners else _template(config))
        if warm is None:
            self.vm = MicroVM(config)
        else:
            self.vm, self._ready = warm
        for listener in listeners:
            self.vm.serial.on_output(listener)

    @property
    def backend(self) -> str:
        return self.vm.backend

    def boot(self, timeout_s: float) -> tuple[socket.socket, Ready | None]:
        if self._ready is None:
            with self.vm.vsock.listen(PORT) as listener:
                self.vm.start()
                return listener.accept(timeout_s), None
        if self._parked:
            self.vm.forked()
            self.vm.unpark()
        else:
            self.vm.start()
        sock = self.vm.vsock.connect(PORT, timeout_s)
        client = AgentClient(lambda: sock, timeout_s)
        client.renew(frozen_clock=self._frozen_clock)
        return client.release(), self._ready

    def connect(self) -> socket.socket:
        try:
            return self.vm.vsock.connect(PORT, CONNECT_TIMEOUT_S)
        except MicroVMError as error:
            raise ExecError(f"cannot connect to the guest: {error}") from None

    def wait(self, timeout_s: float | None) -> Outcome | None:
        return self.vm.wait(timeout_s)

    def console_tail(self) -> bytes:
        return self.vm.serial.tail(TAIL_BYTES)

    def close(self) -> None:
        self.vm.close()


def _template(config: MachineConfig) -> tuple[MicroVM, Ready] | None:
    """The machine restored from its template, if there is one that fits."""
    from .workers import template

    return template.restore_if_there(config)


def _configure(
    image: str | os.PathLike[str],
    kernel: str | os.PathLike[str] | None,
    memory_mib: int,
    cpus: int,
    backend: str,
    disks: Sequence[DiskConfig],
    cmdline: str,
) -> MachineConfig:
    from .images import images, initrd, kernels
    from .machine.config import check_backend, check_cpus, check_memory

    check_memory(memory_mib)
    check_cpus(cpus)
    check_backend(backend)
    chosen, root = kernels.resolve(kernel), images.resolve(image)
    parts: list[Path | bytes] = [] if chosen.initrd is None else [chosen.initrd]
    parts.append(initrd.agent_initrd(agent_program()))
    return MachineConfig(
        chosen.path,
        initrds=parts,
        cmdline=" ".join(filter(None, [BASE_CMDLINE, f"microvm.root={ROOT_DISK}", cmdline])),
        memory_mib=memory_mib,
        cpus=cpus,
        disks=[DiskConfig(root.path, read_only=True), *disks],
        backend=backend,
        console=False,
    )


def agent_program() -> Path:
    """The guest agent's executable, which is built with the package. Raises ConfigError where it is missing."""
    path = Path(__file__).parent / "agent" / "guest" / "agent-x86_64"
    if not path.is_file():
        raise ConfigError("guest agent", str(path), "was not built: install musl-tools, then the package again")
    return path


def _tail(console: bytes) -> str:
    """The end of the console's output as the end of a message."""
    from .workers.template import tail

    return tail(console)


def _words(command: Command) -> Sequence[Text]:
    return ["/bin/sh", "-c", command] if isinstance(command, str) else command
