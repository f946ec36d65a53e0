"""The vCPU threads of one machine: running them, holding them, ending them.

A vCPU thread alternates between `Vcpu.run` and a look at what is wanted. What is wanted changes under the lock and
every vCPU is kicked after that; a kick is sticky, so a vCPU that was just about to enter the guest comes straight
back. Nothing here is held while a guest runs, so a handler on a vCPU thread may call `end`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from ..bus import Bus
from ..errors import GuestError, InternalError
from ..hypervisor.base import StopReason, Vcpu
from .outcome import End, Outcome

_RUN: Final = 0
_HOLD: Final = 1
_END: Final = 2
_PARK: Final = 3


class VcpuThreads:
    """Runs vCPUs, a thread each. ``ended`` is called once, on the last vCPU thread, when none runs any more."""

    def __init__(self, vcpus: Sequence[Vcpu], bus: Bus, ended: Callable[[], None], name: str = "vcpu") -> None:
        self._vcpus = tuple(vcpus)
        self._bus = bus
        self._ended = ended
        self._name = name
        self._changed = threading.Condition()
        self._wanted = _RUN
        self._inside = 0  # vCPU threads between admission and the return of `run`
        self._alive = 0
        self._halted = 0
        self._parked = False
        self._threads: list[threading.Thread] = []
        self._done = threading.Event()
        self.outcome: Outcome | None = None
        self.error: InternalError | None = None

    def start(self) -> None:
        """Start the threads. Raises RuntimeError where the host has no more; those already started are ended."""
        self._alive = len(self._vcpus)
        for vcpu in self._vcpus:
            # Daemon threads: a program that forgets to close its machine still exits (machine.py closes it at exit).
            thread = threading.Thread(target=self._main, args=(vcpu,), name=f"{self._name}-{vcpu.index}", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                with self._changed:
                    self._alive -= len(self._vcpus) - len(self._threads)
                self.end(Outcome(End.STOPPED, "the host has no more threads"))
                self.join()
                raise
            self._threads.append(thread)

    def hold(self) -> None:
        """Bring every vCPU out of the guest and keep it there. Returns when all are out. Not on a vCPU thread."""
        with self._changed:
            if self._wanted == _RUN:
                self._wanted = _HOLD
        self._kick()
        with self._changed:
            self._changed.wait_for(lambda: self._inside == 0)

    def release(self) -> None:
        """Let held vCPUs go on."""
        with self._changed:
            if self._wanted == _HOLD:
                self._wanted = _RUN
                self._changed.notify_all()

    def park(self) -> None:
        """While held: end the threads themselves, so that the process may fork. `unpark` makes new ones."""
        with self._changed:
            if self._wanted != _HOLD:
                return
            self._wanted = _PARK
            self._changed.notify_all()
        self.join()
        with self._changed:
            self._parked = self._wanted == _PARK
            self._halted = 0

    def unpark(self) -> None:
        """New threads, held as they were. In this process or in one forked from it."""
        self._changed = threading.Condition()
        if self._parked:
            self._parked = False
            self._wanted = _HOLD
            self.start()

    def end(self, outcome: Outcome, error: InternalError | None = None) -> None:
        """End the machine. The first outcome counts. Any thread; returns before the vCPUs are out."""
        with self._changed:
            if self.outcome is None:
                self.outcome = outcome
                self.error = error
            self._wanted = _END
            self._changed.notify_all()
            parked, self._parked = self._parked, False
        self._kick()
        if parked:
            self._finish()  # there is no thread to do it

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until no vCPU runs any more and ``ended`` has returned. False if that took longer than ``timeout_s``."""
        return self._done.wait(timeout_s)

    def join(self) -> None:
        """Wait for the threads themselves. Not on a vCPU thread."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _kick(self) -> None:
        for vcpu in self._vcpus:
            vcpu.kick()

    def _admit(self) -> bool:
        with self._changed:
            while self._wanted == _HOLD:
                self._changed.wait()
            if self._wanted in (_END, _PARK):
                return False
            self._inside += 1
            return True

    def _left(self) -> None:
        with self._changed:
            self._inside -= 1
            if self._wanted != _RUN:
                self._changed.notify_all()

    def _main(self, vcpu: Vcpu) -> None:
        try:
            while self._admit():
                try:
                    stop = vcpu.run(self._bus)
                finally:
                    self._left()
                if stop.reason == StopReason.KICKED:
                    continue
                if stop.reason == StopReason.HALTED:
                    self._rest()
                elif stop.reason == StopReason.POWERED_OFF:
                    self.end(Outcome(End.POWERED_OFF, stop.detail))
                elif stop.triple_fault:
                    self.end(Outcome(End.RESET, stop.detail))
                else:
                    self.end(Outcome(End.CRASHED, stop.detail or "the vCPU cannot go on"))
        except GuestError as error:
            self.end(Outcome(End.CRASHED, str(error)))
        except BaseException as error:  # noqa: BLE001 - whatever it is, this VM ends and `MicroVM.wait` raises it
            self.end(Outcome(End.CRASHED, "internal error"), _internal(error))
        finally:
            with self._changed:
                self._alive -= 1
                last = self._alive == 0 and self._wanted != _PARK
            if last:
                self._finish()

    def _rest(self) -> None:
        """HLT with interrupts off: nothing we model wakes this vCPU, so its thread waits for the end of the machine."""
        with self._changed:
            self._halted += 1
            everyone = self._halted == len(self._vcpus)
        if everyone:
            self.end(Outcome(End.HALTED, "every vCPU stands still with interrupts off"))
        with self._changed:
            self._changed.wait_for(lambda: self._wanted in (_END, _PARK))

    def _finish(self) -> None:
        try:
            self._ended()
        except Exception as error:  # noqa: BLE001 - same
            if self.error is None:
                self.error = _internal(error)
        finally:
            self._done.set()


def _internal(error: BaseException) -> InternalError:
    if isinstance(error, InternalError):
        return error
    wrapped = InternalError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    wrapped.__cause__ = error
    return wrapped
