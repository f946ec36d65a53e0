"""The I/O thread: one thread per machine that waits for sockets, doorbells and timers and runs their callbacks.

Nothing exists before ``start``, neither thread nor descriptor, because a machine must be forkable until it
runs. Callbacks run one after another on the reactor's thread; each bounds its own work, so that none starves the
others. Registration from another thread travels to the reactor's thread and takes effect there, in order.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from .._os.event import Event
from .._os.poller import HANGUP, READABLE, WRITABLE, Poller
from ..errors import StateError

T = TypeVar("T")
Callback = Callable[[], None]
_MAX_WAIT_S: Final = 3600.0  # epoll counts milliseconds in an int; an hourly empty round costs nothing


class Timer:
    """A pending ``call_later``. ``cancel`` works from any thread and any number of times."""

    __slots__ = ("_callback",)

    def __init__(self, callback: Callback) -> None:
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Never run the callback, unless it is already running."""
        self._callback = None

    def _fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class _Watch:
    __slots__ = ("hangup", "reader", "writer")

    def __init__(self) -> None:
        self.reader: Callback | None = None
        self.writer: Callback | None = None
        self.hangup: Callback | None = None

    def mask(self) -> int:
        return (
            (READABLE if self.reader is not None else 0)
            | (WRITABLE if self.writer is not None else 0)
            | (HANGUP if self.hangup is not None else 0)
        )


class Reactor:
    """One I/O thread. Every method may be called from any thread.

    ``on_error`` gets each exception a callback lets out, on the reactor's thread: the machine stops the VM with
    it. The reactor itself goes on, so that the stop can use it.
    """

    def __init__(self, on_error: Callable[[Exception], None], name: str = "microvm-io") -> None:
        self._on_error = on_error
        self._name = name
        self._lock = threading.Lock()
        self._calls: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._watches: dict[int, _Watch] = {}
        self._thread: threading.Thread | None = None
        self._ident: int | None = None
        self._event: Event | None = None
        self._poller: Poller | None = None
        self._waiting: set[threading.Event] = set()  # callers inside call_and_wait
        self._awake = False
        self._stopping = False
        self._suspending = False

    @property
    def running(self) -> bool:
        """Whether the thread exists and has not been told to stop."""
        return self._thread is not None and not self._stopping

    def in_thread(self) -> bool:
        """Whether the caller is on the reactor's thread."""
        return threading.get_ident() == self._ident

    def start(self) -> None:
        """Create the thread. What was registered and posted before takes effect now. Raises StateError if used."""
        with self._lock:
            if self._thread is not None or self._stopping:
                raise StateError("the reactor was started before")
            self._begin()

    def _begin(self) -> None:
        self._event = Event()
        self._poller = Poller()
        self._poller.set(self._event.fd, READABLE)
        for fd, watch in self._watches.items():
            self._poller.set(fd, watch.mask())
        self._awake = True  # the first round looks at the calls without being told
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def suspend(self) -> None:
        """End the thread as `stop` does, but keep what is watched and what was posted, for `resume`.

        After it the process may fork. Not on the reactor's thread. Raises StateError unless running.
        """
        with self._lock:
            thread = self._thread
            if thread is None or self._stopping:
                raise StateError("the reactor does not run")
            self._suspending = self._stopping = True
            assert self._event is not None
            self._event.set()
        thread.join()

    def resume(self) -> None:
        """Go on after `suspend`, in this process or in a forked one. Raises StateError."""
        with self._lock:
            if not self._suspending:
                raise StateError("the reactor was not suspended")
            self._suspending = self._stopping = False
            self._begin()

    def forget_all(self) -> None:
        """While suspended: watch nothing any more, and drop timers and calls. For the forked process."""
        self._calls.clear()
        self._watches.clear()
        self._timers.clear()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End the thread, wait for it, and free the reactor's own descriptors. Idempotent.

        Watched descriptors stay open: they belong to whoever registered them. From a callback it only marks the
        end; the thread leaves, and frees everything, once the callback returns.
        """
        with self._lock:
            self._stopping = True
            thread = self._thread
            if self._event is not None:
                self._event.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if thread is None:
            self._calls.clear()

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` is readable or at its end, until removed."""

        def setter(watch: _Watch) -> None:
            watch.reader = callback

        self._change(fd, setter)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` whenever ``fd`` takes more or has failed, until removed."""

        def setter(watch: _Watch) -> None:
            watch.writer = callback

        self._change(fd, setter)

    def add_hangup(self, fd: int, callback: Callback) -> None:
        """Call ``callback`` once when the other end of ``fd`` is gone altogether.

        A reader or writer on the same descriptor is called instead. Hosts without epoll never report it.
        """

        def setter(watch: _Watch) -> None:
            watch.hangup = callback

        self._change(fd, setter)

    def remove_reader(self, fd: int) -> None:
        """Stop waiting for ``fd`` to be readable."""

        def setter(watch: _Watch) -> None:
            watch.reader = None

        self._change(fd, setter)

    def remove_writer(self, fd: int) -> None:
        """Stop waiting for ``fd`` to take more."""

        def setter(watch: _Watch) -> None:
            watch.writer = None

        self._change(fd, setter)

    def remove(self, fd: int) -> None:
        """Forget ``fd``. On the reactor's thread it can be closed right after."""

        def setter(watch: _Watch) -> None:
            watch.reader = watch.writer = watch.hangup = None

        self._change(fd, setter)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Run ``callback`` on the reactor's thread, in the order posted. Does nothing after ``stop``."""
        if self._stopping and not self._suspending:
            return
        self._calls.append(callback)
        # Posting and waking are two steps; the loop lowers the flag before it looks at the queue, so a callback
        # posted after that look always finds the flag down and sets the event.
        if not self._awake:
            self._awake = True
            event = self._event
            if event is not None and not self.in_thread():
                with self._lock:
                    event.set()  # does nothing while suspended: the first round after that looks by itself

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Run ``callback`` on the reactor's thread no sooner than ``seconds`` from now."""
        timer = Timer(callback)
        deadline = time.monotonic() + seconds

        def schedule() -> None:
            heapq.heappush(self._timers, (deadline, next(self._order), timer))

        self._post(schedule)
        return timer

    def call_and_wait(self, function: Callable[[], T]) -> T:
        """Run ``function`` on the reactor's thread and return what it returns, or raise what it raises.

        On the reactor's thread it runs at once. Raises StateError if the reactor is not running or stops first.
        """
        if self.in_thread():
            return function()
        done = threading.Event()
        with self._lock:
            if not self.running:
                raise StateError("the machine is not running")
            self._waiting.add(done)
        results: list[T] = []
        errors: list[Exception] = []

        def call() -> None:
            try:
                results.append(function())
            except Exception as error:  # noqa: BLE001 - carried to the caller's thread and raised there
                errors.append(error)
            finally:
                done.set()

        self.call_soon_threadsafe(call)
        try:
            done.wait()
        finally:
            with self._lock:
                self._waiting.discard(done)
        if errors:
            raise errors[0]
        if not results:
            raise StateError("the machine stopped")
        return results[0]

    def _post(self, callback: Callback) -> None:
        if self.in_thread():
            callback()
        else:
            self.call_soon_threadsafe(callback)

    def _change(self, fd: int, setter: Callable[[_Watch], None]) -> None:
        def apply() -> None:
            watch = self._watches.get(fd)
            if watch is None:
                watch = _Watch()
            setter(watch)
            mask = watch.mask()
            if mask:
                self._watches[fd] = watch
            else:
                self._watches.pop(fd, None)
            assert self._poller is not None
            self._poller.set(fd, mask)

        self._post(apply)

    def _run(self) -> None:
        self._ident = threading.get_ident()
        poller, event = self._poller, self._event
        assert poller is not None
        assert event is not None
        event_fd = event.fd
        try:
            while True:
                self._awake = False
                if self._suspending:
                    return
                self._run_calls()
                if self._stopping:
                    return
                timeout = self._run_timers()
                for fd, ready in poller.wait(0 if self._awake else timeout):
                    if fd == event_fd:
                        event.clear()
                        continue
                    watch = self._watches.get(fd)
                    if watch is not None:
                        self._serve(fd, watch, ready)
                    if self._stopping:
                        return
        finally:
            self._ident = None
            with self._lock:
                self._stopping = True
                event.close()
                poller.close()
                suspending = self._suspending
                if not suspending:
                    for done in self._waiting:
                        done.set()
            if not suspending:
                self._calls.clear()
                self._watches.clear()
                self._timers.clear()

    def _serve(self, fd: int, watch: _Watch, ready: int) -> None:
        gone = ready & HANGUP
        try:
            reader = watch.reader
            if reader is not None and (ready & READABLE or gone):
                reader()
            writer = watch.writer
            if writer is not None and (ready & WRITABLE or gone):
                writer()
            if gone and reader is None and writer is None and watch.hangup is not None:
                hangup, watch.hangup = watch.hangup, None
                self.remove(fd)  # once: the condition lasts, and a level-triggered wait would spin on it
                hangup()
        except Exception as error:  # noqa: BLE001 - reported, and the machine stops: see on_error
            self._watches.pop(fd, None)  # a callback that fails would be called again at once
            assert self._poller is not None
            self._poller.set(fd, 0)
            self._report(error)

    def _run_calls(self) -> None:
        calls = self._calls
        # Only what is there now: a callback that posts itself again must not keep the descriptors waiting.
        for _ in range(len(calls)):
            try:
                calls.popleft()()
            except Exception as error:  # noqa: BLE001 - reported, and the machine stops: see on_error
                self._report(error)
        if calls:
            self._awake = True

    def _run_timers(self) -> float:
        timers = self._timers
        now = time.monotonic()
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            try:
                timer._fire()
            except Exception as error:  # noqa: BLE001 - reported, and the machine stops: see on_error
                self._report(error)
        return min(max(timers[0][0] - now, 0.0), _MAX_WAIT_S) if timers else _MAX_WAIT_S

    def _report(self, error: Exception) -> None:
        self._on_error(error)
