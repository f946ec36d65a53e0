"""The kernel command line: checked, encoded, terminated."""

from __future__ import annotations

from ..errors import ConfigError
from . import layout


def encode(cmdline: str, limit: int) -> bytes:
    """``cmdline`` as the kernel reads it, with the final NUL. ``limit`` is the most bytes the kernel takes without it.

    Refused rather than cut: a kernel that cuts silently drops the arguments after ``--``. Raises ConfigError.
    """
    if "\0" in cmdline or "\n" in cmdline or "\r" in cmdline:
        raise ConfigError("command line", cmdline.encode("unicode_escape").decode(), "one line without NUL")
    try:
        data = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise ConfigError("command line", ascii(cmdline), "text that UTF-8 can hold") from None
    limit = min(limit, layout.CMDLINE_MAX - 1)
    if len(data) > limit:
        raise ConfigError("command line", f"of {len(data)} bytes", f"this kernel takes at most {limit}")
    return data + b"\0"
