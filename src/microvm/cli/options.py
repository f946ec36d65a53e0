"""Options that several commands share, and reading their values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from ..errors import ConfigError

if TYPE_CHECKING:
    import argparse

_SIZE: Final = re.compile(r"(-?\d+)\s*(|m|mb|mib|g|gb|gib)", re.IGNORECASE)


def add_machine_options(parser: argparse.ArgumentParser, memory: str) -> None:
    """``--memory``, ``--cpus`` and ``--backend``."""
    parser.add_argument(
        "--memory", metavar="SIZE", default=memory, help="RAM in MiB, or with a unit: 512M, 2G (default %(default)s)"
    )
    parser.add_argument("--cpus", metavar="N", default="1", help="virtual processors, 1 to 32 (default 1)")
    parser.add_argument(
        "--backend", metavar="NAME", default="auto", help="auto, or a name that `microvm doctor` lists (default auto)"
    )


def memory_mib(text: str) -> int:
    """``--memory``'s value in MiB. Raises ConfigError."""
    from ..machine.config import check_memory

    found = _SIZE.fullmatch(text.strip())
    if found is None or len(found[1]) > 12:
        raise ConfigError("memory", repr(text), "must be a whole number of MiB, or one with a unit such as 512M or 2G")
    mib = int(found[1]) << (10 if found[2][:1].lower() == "g" else 0)
    check_memory(mib)
    return mib


def cpu_count(text: str) -> int:
    """``--cpus``' value. Raises ConfigError."""
    from ..machine.config import check_cpus

    try:
        count = int(text)
    except ValueError:
        raise ConfigError("cpus", repr(text), "must be a whole number") from None
    check_cpus(count)
    return count


def seconds(field: str, text: str | None) -> float | None:
    """A duration in seconds, above zero. Raises ConfigError."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        raise ConfigError(field, repr(text), "must be a number of seconds") from None
    if not 0 < value < 1e9:
        raise ConfigError(field, repr(text), "must be a number of seconds above zero")
    return value


def environment(pairs: list[str]) -> dict[str, str]:
    """``--env`` values: ``NAME=VALUE``, or ``NAME`` to pass on this process's own. Raises ConfigError."""
    import os

    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise ConfigError("env", repr(pair), "must be NAME=VALUE")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found
