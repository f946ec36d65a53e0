"""`Pool`: sandboxes that stand ready, for work that comes in many pieces.

with Pool(4, "python") as pool:
    results = pool.map(["python3", "-c", "import sys; print(int(sys.argv[1]) ** 2)"], range(100))
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Self

from .api import Sandbox
from .errors import ConfigError, ExecTimeout, StateError

MAX_SIZE: Final = 256

Work = Callable[[Sandbox, Any], Any] | str | Sequence[str]


class Pool:
    """Keeps ``size`` booted sandboxes ready to take, and replaces those that were taken. Any thread.

    ``options`` are those of `Sandbox`. Entering the ``with`` block, or `start`, begins to fill it; leaving the block
    ends those that nobody took. Raises ConfigError.
    """

    def __init__(self, size: int = 4, image: str | os.PathLike[str] = "python", **options: Any) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
            raise ConfigError("size", size, f"must be 1 to {MAX_SIZE}")
        Sandbox(image, **options)  # raises now what would be raised for each
        self.size = size
        self._image = image
        self._options = options
        self._changed = threading.Condition()
        self._ready: deque[Sandbox] = deque()
        self._failure: Exception | None = None
        self._filler: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ready(self) -> int:
        """How many stand ready now."""
        return len(self._ready)

    def start(self) -> None:
        """Begin to fill. Does nothing the second time. Raises StateError once closed."""
        with self._changed:
            if self._closed:
                raise StateError("the pool is closed")
            if self._filler is None:
                self._filler = threading.Thread(target=self._fill, name="microvm-pool", daemon=True)
                self._filler.start()

    def take(self, timeout: float | None = None) -> Sandbox:
        """A booted sandbox, which is the caller's to close.

        Raises TimeoutError after ``timeout`` seconds without one, StateError if the pool is not open, and what booting
        raised if that is why there is none.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._ready:
                if self._closed or self._filler is None:
                    raise StateError('the pool is not open: use "with", or start()')
                failure, self._failure = self._failure, None
                if failure is not None:
                    self._changed.notify_all()
                    raise failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"no sandbox was ready within {timeout:g} s")
                self._changed.wait(left)
            sandbox = self._ready.popleft()
            self._changed.notify_all()
        return sandbox

    def map(
        self,
        work: Work,
        items: Iterable[Any],
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Do ``work`` for each item in a sandbox of its own, ``size`` at a time; the results in the items' order.

        ``work`` is a function of a sandbox and an item; or a command as a list, which gets the item as its last
        argument; or a shell command, which finds it in ``$1``. Commands give a `Result`. ``timeout`` in seconds is for
        each item: then its sandbox is ended and the item's outcome is ExecTimeout. ``progress(done, total)`` is called
        after each. The first exception ends the work and is raised, unless ``return_exceptions`` puts them among the
        results.
        """
        todo = list(items)
        results: list[Any] = [None] * len(todo)
        indices = iter(range(len(todo)))
        lock = threading.Lock()
        failures: list[BaseException] = []
        done = 0

        def worker() -> None:
            nonlocal done
            while True:
                with lock:
                    index = None if failures else next(indices, None)
                if index is None:
                    return
                try:
                    results[index] = self._one(work, todo[index], timeout)
                except BaseException as error:  # noqa: BLE001 - raised or returned by map
                    if not return_exceptions or not isinstance(error, Exception):
                        with lock:
                            failures.append(error)
                        return
                    results[index] = error
                with lock:
                    done += 1
                    if progress is not None:
                        progress(done, len(todo))

        count = min(self.size, len(todo))
        threads = [
            threading.Thread(target=worker, name=f"microvm-map-{number}", daemon=True) for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return results

    def _one(self, work: Work, item: Any, timeout: float | None) -> Any:
        with self.take() as sandbox:
            if not callable(work):
                return sandbox.run(command_for(work, item), timeout=timeout)
            if timeout is None:
                return work(sandbox, item)
            late = threading.Event()

            def end() -> None:
                late.set()
                sandbox.close()  # whatever the work waits for ends with it

            timer = threading.Timer(timeout, end)
            timer.daemon = True
            timer.start()
            try:
                return work(sandbox, item)
            except Exception as error:
                if late.is_set():
                    raise ExecTimeout(f"the work on {item!r} took longer than {timeout:g} s") from error
                raise
            finally:
                timer.cancel()

    def close(self) -> None:
        """End the sandboxes nobody took. Those that were taken go on. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._filler is not None:
            self._filler.join()
        while self._ready:
            self._ready.popleft().close()

    def _fill(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or (len(self._ready) < self.size and self._failure is None))
                if self._closed:
                    return
            try:
                sandbox = Sandbox(self._image, **self._options)
                sandbox.boot()
            except Exception as error:  # noqa: BLE001 - raised by take
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                continue
            with self._changed:
                self._ready.append(sandbox)
                self._changed.notify_all()


def command_for(work: str | Sequence[str], item: Any) -> list[str]:
    """The command for an item; see `Pool.map`."""
    if isinstance(work, str):
        return ["/bin/sh", "-c", work, "sh", str(item)]
    return [*work, str(item)]
