"""Getting a thread out of KVM_RUN: one real-time signal with a handler that does nothing.

KVM_RUN returns EINTR when a signal with a handler arrives. The handler is a C function without effects, installed
with SA_RESTART behind Python's back: the host program's other system calls go on as if nothing had happened, Python's
own signal machinery never hears of it, and ``signal.set_wakeup_fd`` (asyncio) stays silent. A signal whose
disposition is not the default belongs to the host program and is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import signal
import sys
from typing import Any, Final

from ...errors import BackendUnavailable
from .api import libc

SA_RESTART: Final = 0x1000_0000
SA_ONSTACK: Final = 0x0800_0000
SYS_timer_create: Final = 222
SYS_timer_settime: Final = 223
SYS_timer_delete: Final = 226
CLOCK_MONOTONIC: Final = 1
SIGEV_THREAD_ID: Final = 4

# A halted vCPU is looked at this often, and for the first time after this many nanoseconds.
POKE_FIRST_NS: Final = 10_000_000
POKE_INTERVAL_NS: Final = 250_000_000


class _sigaction(ctypes.Structure):
    _fields_ = (
        ("sa_handler", ctypes.c_void_p),
        ("sa_mask", ctypes.c_uint64 * 16),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_void_p),
    )


class _sigevent(ctypes.Structure):
    _fields_ = (
        ("sigev_value", ctypes.c_uint64),
        ("sigev_signo", ctypes.c_int),
        ("sigev_notify", ctypes.c_int),
        ("sigev_notify_thread_id", ctypes.c_int),
        ("pad", ctypes.c_int * 11),
    )


class _itimerspec(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns"))


@functools.cache
def kick_signal() -> int:
    """The number of the signal; the first call installs its handler. Raises BackendUnavailable if none is free."""
    if sys.platform != "linux":
        raise AssertionError("KVM is Linux")
    library = libc()
    # abs(int) takes what a handler takes, touches no memory and never fails.
    handler = ctypes.cast(library["abs"], ctypes.c_void_p).value
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        present = _sigaction()
        if library.sigaction(number, None, ctypes.byref(present)) != 0 or present.sa_handler:
            continue
        action = _sigaction(sa_handler=handler, sa_flags=SA_RESTART | SA_ONSTACK)
        if library.sigaction(number, ctypes.byref(action), None) == 0:
            return number
    raise BackendUnavailable("sigaction", errno.EBUSY, "every real-time signal is taken", "free one for KVM")


def unblock_kick_signal() -> None:
    """Let the calling thread receive the signal; threads inherit masks that may block it."""
    if sys.platform != "linux":
        raise AssertionError("KVM is Linux")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {kick_signal()})


class Poke:
    """A timer that interrupts one thread now and then, so that it can look whether its vCPU halted for good.

    KVM blocks in the kernel on HLT, with interrupts off as well as on; only a look from outside tells them apart. A
    host that refuses the timer (RLIMIT_SIGPENDING) loses that look, nothing else.
    """

    __slots__ = ("_off", "_on", "_syscall", "_timer")

    def __init__(self, thread_id: int) -> None:
        self._syscall: Any = libc()["syscall"]
        event = _sigevent(sigev_signo=kick_signal(), sigev_notify=SIGEV_THREAD_ID, sigev_notify_thread_id=thread_id)
        timer = ctypes.c_int(-1)
        made = self._syscall(SYS_timer_create, CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer))
        self._timer = timer.value if made == 0 else -1
        self._on = _itimerspec(interval_ns=POKE_INTERVAL_NS, value_ns=POKE_FIRST_NS)
        self._off = _itimerspec()

    def start(self) -> None:
        if self._timer >= 0:
            self._syscall(SYS_timer_settime, self._timer, 0, ctypes.byref(self._on), None)

    def stop(self) -> None:
        if self._timer >= 0:
            self._syscall(SYS_timer_settime, self._timer, 0, ctypes.byref(self._off), None)

    def close(self) -> None:
        timer, self._timer = self._timer, -1
        if timer >= 0:
            self._syscall(SYS_timer_delete, timer)
