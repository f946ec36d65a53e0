"""How long steps show themselves on stderr: one line rewritten on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Final, Self, TextIO

_PLAIN_EVERY_S: Final = 15.0
_REDRAW_EVERY_S: Final = 0.1


class Bar:
    """A progress callback (``message``, ``fraction`` or None) that is closed by leaving its ``with`` block."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._tty = self._stream.isatty()
        self._shown = ""
        self._at = 0.0
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def __call__(self, message: str, fraction: float | None) -> None:
        now = time.monotonic()
        every = _REDRAW_EVERY_S if self._tty else _PLAIN_EVERY_S
        if message == self._shown and now - self._at < every:
            return
        new_step = message != self._shown
        self._shown, self._at = message, now
        text = message if fraction is None or fraction >= 1 else f"{message} {fraction:.0%}"
        if not self._tty:
            self._stream.write(f"{text}\n")
        else:
            start = "\n" if new_step and self._width else "\r"
            self._stream.write(f"{start}{text:<{0 if new_step else self._width}}")
            self._width = len(text)
        self._stream.flush()
