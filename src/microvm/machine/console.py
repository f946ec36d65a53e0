"""A terminal line of the guest as the host uses it: what it printed, and a way to type."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

SCROLLBACK: Final = 256 << 10  # a guest can print for ever: what nobody reads is dropped, oldest first


class Console:
    """One console of a machine (hvc0 or the serial port). Thread-safe.

    The last ``scrollback`` bytes of output are kept; ``dropped`` counts those that were lost before `read` saw them.
    """

    def __init__(self, scrollback: int = SCROLLBACK) -> None:
        self._limit = scrollback
        self._text = bytearray()
        self._start = 0  # position in the whole output of the first byte kept
        self._cursor = 0  # position up to which `read` has given the output out
        self._arrived = threading.Condition()
        self._closed = False
        self._listeners: list[Callable[[bytes], None]] = []
        self._type: Callable[[bytes], int] | None = None
        self._resize: Callable[[int, int], None] | None = None
        self._typing = threading.Lock()
        self._room = threading.Event()
        self.dropped = 0

    def connect(self, type_: Callable[[bytes], int], resize: Callable[[int, int], None] | None = None) -> None:
        """Attach the device's input side, by whoever builds the machine.

        ``type_`` takes as many bytes as it has room for and returns how many; after a short count the device calls
        `room` when there is some again.
        """
        self._type = type_
        self._resize = resize

    def room(self) -> None:
        """The device takes input again. Any thread."""
        self._room.set()

    def feed(self, data: bytes) -> None:
        """The guest printed ``data``. Called on the device's thread."""
        with self._arrived:
            self._text += data
            excess = len(self._text) - self._limit
            if excess > 0:
                del self._text[:excess]
                self._start += excess
                if self._cursor < self._start:
                    self.dropped += self._start - self._cursor
                    self._cursor = self._start
            self._arrived.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(data)

    def close(self) -> None:
        """No more output will come: readers see the end. Idempotent."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        self._room.set()

    def read(self, timeout_s: float | None = None) -> bytes:
        """Output not read before, waiting for some. ``b""`` after ``timeout_s``, and at the end of the machine."""
        with self._arrived:
            self._arrived.wait_for(self._readable, timeout_s)
            return self._take(len(self._text) + self._start)

    def read_until(self, text: bytes, timeout_s: float | None = None) -> bytes:
        """Output not read before up to and including ``text``. Raises TimeoutError, or EOFError at the end."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._arrived:
            while True:
                found = self._text.find(text, self._cursor - self._start)
                if found >= 0:
                    return self._take(self._start + found + len(text))
                if self._closed:
                    raise EOFError(f"the guest ended without printing {text!r}")
                left = None if deadline is None else deadline - time.monotonic()
                if not self._arrived.wait(left) and left is not None:
                    raise TimeoutError(f"the guest did not print {text!r} within {timeout_s} s")

    def write(self, data: bytes, timeout_s: float | None = None) -> int:
        """Type ``data``, waiting while the guest does not read. Returns how much it took: all, but for the time-out and
        the end of the machine.
        """
        if self._type is None:
            return 0
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = 0
        with self._typing:
            while done < len(data) and not self._closed:
                self._room.clear()
                taken = self._type(data[done:])
                done += taken
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not taken and not self._closed and not self._room.wait(left):
                    break
        return done

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the size of the terminal; nothing happens on a line that has no size (serial)."""
        if self._resize is not None:
            self._resize(columns, rows)

    def on_output(self, listener: Callable[[bytes], None], replay: bool = False) -> Callable[[], None]:
        """Call ``listener`` with each piece of output, on the device's thread: it must not block.

        With ``replay`` it first gets what is kept. Returns a function that ends it.
        """
        with self._arrived:
            self._listeners.append(listener)
            if replay and self._text:
                listener(bytes(self._text))  # under the lock, so that newer output cannot overtake it

        def forget() -> None:
            with self._arrived:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return forget

    def tail(self, size: int = SCROLLBACK) -> bytes:
        """The last ``size`` bytes of output, read or not."""
        with self._arrived:
            return bytes(self._text[-size:]) if size > 0 else b""

    def _readable(self) -> bool:
        return self._closed or self._cursor < self._start + len(self._text)

    def _take(self, end: int) -> bytes:
        data = bytes(self._text[self._cursor - self._start : end - self._start])
        self._cursor = end
        return data
