"""`MicroVM`: a machine from the outside, and the threads that make it live.

A machine is built whole by its constructor: memory, kernel, devices, vCPUs with their first registers. Up to `start` it
has neither a thread nor a descriptor that a fork would share with its parent; `start` makes both. Its vCPUs run until
the guest ends or `stop` is called; `wait` gives the outcome. `close` frees everything, from any state, any number of
times, and is called at the end of the interpreter for what was forgotten.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

from ..errors import ConfigError, InternalError, StateError
from .builder import build
from .config import MachineConfig
from .console import Console
from .outcome import End, Outcome
from .vcpus import VcpuThreads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from ..hypervisor.base import Hypervisor
    from ..virtio import VirtioDevice
    from .snapshots import Origin, Restored
    from .vsock_host import VsockHost

SWITCH_INTERVAL_S: Final = 50e-6  # a vCPU thread in Python holds up I/O threads by at most this (default: 5 ms)


class State:
    """What a machine is doing."""

    BUILT: Final = "built"
    RUNNING: Final = "running"
    PAUSED: Final = "paused"
    PARKED: Final = "parked"
    ENDED: Final = "ended"
    CLOSED: Final = "closed"


class MicroVM:
    """One virtual machine. Methods may be called from any thread, but not from callbacks unless they say so.

    ``devices`` are virtio devices of yours, added behind the configured ones; each belongs to one machine.
    ``hypervisor`` overrides the choice made by ``config.backend``. Raises ConfigError, BootError for what cannot be
    booted, BackendUnavailable where nothing can run it, HostError if the host refuses.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        devices: Sequence[VirtioDevice] = (),
        hypervisor: Hypervisor | None = None,
        _restored: Restored | None = None,
    ) -> None:
        self.config = config
        self._restored = _restored is not None
        self._lock = threading.RLock()
        self._state = State.BUILT
        self._owner = os.getpid()
        self._end_listeners: list[Callable[[], None]] = []
        _tune_interpreter()
        self._machine = build(config, hypervisor, self._end, devices, _restored)
        self._threads = VcpuThreads(self._machine.vcpus, self._machine.bus, self._ended)
        _open_machines.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MicroVM {self.state}, {self.config.memory_mib} MiB, {self.config.cpus} vCPU, {self.backend}>"

    @property
    def state(self) -> str:
        """One of `State`."""
        if self._state in (State.RUNNING, State.PAUSED) and self._threads.wait(0):
            return State.ENDED
        return self._state

    @property
    def backend(self) -> str:
        """The name of the backend that runs it."""
        return self._machine.hypervisor.name

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, or None while it has not."""
        return self._threads.outcome if self.state in (State.ENDED, State.CLOSED) else None

    @property
    def ending(self) -> tuple[Outcome | None, InternalError | None]:
        """The outcome as soon as it is decided, and the bug of ours that decided it, if one did. Any thread."""
        return self._threads.outcome, self._threads.error

    def on_end(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when the guest has ended, on a thread of the machine. It must not block or wait."""
        self._end_listeners.append(listener)

    @property
    def can_fork(self) -> bool:
        """Whether `park` works: the backend can fork, and no disk would be written to by two machines."""
        return self._machine.partition.caps.fork and all(disk.read_only for disk in self.config.disks)

    @property
    def thread_count(self) -> int:
        """How many Python threads the machine has while it runs."""
        return len(self._machine.vcpus) + len(self._machine.reactors)

    @property
    def serial(self) -> Console:
        """The serial port, ttyS0."""
        return self._machine.serial

    @property
    def console(self) -> Console:
        """The virtio console, hvc0. Raises StateError for a machine without one."""
        if self._machine.console is None:
            raise StateError("this machine was built without a virtio console")
        return self._machine.console

    @property
    def vsock(self) -> VsockHost:
        """The host's end of the machine's sockets: `connect` and `listen`. Raises StateError without vsock."""
        if self._machine.vsock is None:
            raise StateError("this machine was built without vsock")
        return self._machine.vsock

    def start(self) -> None:
        """Let the guest run. Raises StateError unless freshly built; after any other error the machine is closed."""
        with self._lock:
            if self._state != State.BUILT:
                raise StateError(f"the machine cannot be started: it is {self.state}")
            self._owner = os.getpid()
            try:
                self._machine.start()
                if self._restored:
                    self._machine.partition.resume_time()
                self._threads.start()
            except BaseException:
                self.close()
                raise
            self._state = State.RUNNING

    def pause(self) -> None:
        """Stop the vCPUs and the guest's time. Returns when no vCPU runs. Raises StateError unless running."""
        with self._lock:
            self._require(State.RUNNING)
            self._threads.hold()
            self._machine.partition.pause_time()
            self._state = State.PAUSED

    def resume(self) -> None:
        """Go on as if no time had passed. Raises StateError unless paused."""
        with self._lock:
            self._require(State.PAUSED)
            self._machine.partition.resume_time()
            self._threads.release()
            self._state = State.RUNNING

    @classmethod
    def restore(
        cls, path: str | os.PathLike[str], *, hypervisor: Hypervisor | None = None, verify: bool = False
    ) -> Self:
        """The machine that `snapshot` saved in ``path``, standing still: `start` lets it go on.

        Its memory is the file's, read page by page as it is used and never written to. It is a copy, and its guest is
        told so: it has a new VM generation id, and its connections to the host are reset. Its clock goes on from where
        it stood (a sandbox sets it). ``verify`` reads all of the file first. Raises SnapshotError with one sentence,
        BackendUnavailable, HostError.
        """
        from .snapshots import Restored

        restored = Restored.open(path, verify)
        try:
            return cls(restored.config, hypervisor=hypervisor, _restored=restored)
        finally:
            restored.close()

    def snapshot(
        self, path: str | os.PathLike[str], *, difference: bool = False, note: dict[str, Any] | None = None
    ) -> str:
        """Save the machine into the file ``path`` and let it go on as it was: running, paused, or not yet started.

        A ``difference`` holds only the memory that was written since the snapshot the machine was restored from, and
        needs that one to be restored. ``note`` is kept with it: plain values by name. Returns the snapshot's id. Raises
        StateError for a machine that has ended or has writable disks, HostError if the file cannot be written; then
        ``path`` is as it was.
        """
        return self._save(path, difference=difference, note=note).id

    def _save(
        self,
        path: str | os.PathLike[str],
        *,
        difference: bool = False,
        note: dict[str, Any] | None = None,
        durable: bool = True,
        step: Callable[[str], None] | None = None,
    ) -> Origin:
        from . import snapshots

        with self._lock:
            running, parked = self.state == State.RUNNING, self.state in (State.PARKED, State.BUILT)
            if not running and not parked:
                self._require(State.PAUSED)
            if running:
                self.pause()
            try:
                if not parked:
                    self._machine.suspend()  # I/O threads write memory too
                try:
                    return snapshots.save(
                        self._machine, path, difference=difference, note=note, durable=durable, step=step
                    )
                finally:
                    if not parked:
                        self._machine.resume()
            finally:
                if running:
                    self.resume()

    def park(self) -> None:
        """Pause, and end every thread of the machine, so that the process can fork. Raises StateError unless running.

        In the parent `unpark` lets it go on; in the child, which has a machine of its own then, call `forked` first.
        """
        with self._lock:
            if not self._machine.partition.caps.fork:
                raise StateError(f"the {self.backend} backend cannot fork a machine")
            if any(not disk.read_only for disk in self.config.disks):
                raise StateError("a machine with writable disks cannot be forked: two would write to one disk")
            self.pause()
            self._threads.park()
            self._machine.suspend()
            self._state = State.PARKED

    def forked(self) -> None:
        """In the child of a fork: make the parked machine this process's own. The guest is told that it is a copy."""
        self._require(State.PARKED)
        self._owner = os.getpid()
        self._machine.forked()

    def unpark(self) -> None:
        """Go on after `park`. Raises StateError."""
        with self._lock:
            self._require(State.PARKED)
            self._machine.resume()
            self._threads.unpark()
            self._state = State.PAUSED
            self.resume()

    def wait(self, timeout_s: float | None = None) -> Outcome | None:
        """Wait for the guest to end and say how, or None after ``timeout_s``.

        Raises InternalError if it was a bug of ours that ended it, StateError if it was never started.
        """
        if self._state == State.BUILT:
            raise StateError("the machine has not been started")
        if not self._threads.wait(timeout_s):
            return None
        if self._threads.error is not None:
            raise self._threads.error
        return self._threads.outcome

    def end(self, detail: str = "") -> None:
        """Tell the guest's vCPUs to stop for good, without waiting. Any thread, callback or signal handler."""
        self._end(Outcome(End.STOPPED, detail))

    def stop(self, detail: str = "") -> Outcome | None:
        """End the guest at once, as if its power was cut, and wait until it stands still.

        Consoles and counters can still be read. Returns the outcome, or None for a machine that was never started.
        """
        with self._lock:
            if self._state in (State.BUILT, State.CLOSED):
                return self._threads.outcome
        self.end(detail)
        self._threads.wait()
        return self._threads.outcome

    def close(self) -> None:
        """End the guest and free everything: threads, descriptors, memory. Idempotent."""
        with self._lock:
            if self._state == State.CLOSED:
                return
            started = self._state != State.BUILT
            self._state = State.CLOSED
        _open_machines.discard(self)
        self._threads.end(Outcome(End.STOPPED, "closed"))
        if started and self._owner == os.getpid():
            self._threads.wait()
        self._threads.join()
        self._machine.close()

    def set_balloon(self, target_mib: int) -> None:
        """Ask the guest to give back ``target_mib`` of its RAM; it does so as it can. 0 takes the request back.

        Raises StateError without a balloon, ConfigError if that is more than there is.
        """
        if self._machine.balloon is None:
            raise StateError("this machine was built without a balloon")
        if not 0 <= target_mib <= self.config.memory_mib:
            raise ConfigError("balloon", f"{target_mib} MiB", f"must be 0 to {self.config.memory_mib} MiB")
        self._machine.set_balloon(target_mib)

    def stats(self) -> dict[str, int]:
        """Counters since the machine was built: exits served, notifications, interrupts, failures, bytes dropped."""
        return self._machine.stats()

    def _require(self, state: str) -> None:
        if self.state != state:
            raise StateError(f"the machine is {self.state}, not {state}")

    def _end(self, outcome: Outcome, error: InternalError | None = None) -> None:
        self._threads.end(outcome, error)

    def _ended(self) -> None:
        """On the last vCPU thread: nothing will come from the guest any more."""
        try:
            self._machine.quiesce()
        finally:
            for listener in self._end_listeners:
                listener()


_open_machines: weakref.WeakSet[MicroVM] = weakref.WeakSet()
_tuned = False


def _tune_interpreter() -> None:
    global _tuned
    if not _tuned:
        _tuned = True
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))


@atexit.register
def _close_all() -> None:
    for machine in list(_open_machines):
        if machine._owner == os.getpid():
            machine.close()
