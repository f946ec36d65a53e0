"""The key that snapshots are authenticated with: one a user, made when first needed.

It keeps a snapshot from elsewhere from being taken for one's own. Whoever can read the key can write the user's files
anyway.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..errors import HostError

KEY_SIZE: Final = 32
_NAME: Final = "snapshot.key"


def directory() -> Path:
    """``$MICROVM_CONFIG``, or ``microvm`` under ``$XDG_CONFIG_HOME`` (``%APPDATA%``), or ``~/.config/microvm``."""
    if chosen := os.environ.get("MICROVM_CONFIG"):
        return Path(chosen)
    for variable in ("XDG_CONFIG_HOME", "APPDATA"):
        if base := os.environ.get(variable):
            return Path(base) / "microvm"
    return Path.home() / ".config" / "microvm"


def load() -> bytes:
    """The user's key. Raises HostError if it cannot be read or made."""
    path = directory() / _NAME
    try:
        key = _read(path)
        return _create(path) if key is None else key
    except OSError as error:
        raise HostError(
            "open", error.errno or 0, f"the snapshot key {path} cannot be used: {error.strerror}"
        ) from error


def _read(path: Path) -> bytes | None:
    try:
        with open(path, "rb") as file:
            key = file.read(KEY_SIZE + 1)
    except FileNotFoundError:
        return None
    if len(key) != KEY_SIZE:
        raise OSError(0, "it is damaged; remove it, and with it every snapshot made with it")
    return key


def _create(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = os.urandom(KEY_SIZE)
    temporary = path.with_name(f".{_NAME}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # fails if another process was first: then its key counts
        except FileExistsError:
            pass
        except (OSError, AttributeError):
            os.replace(temporary, path)
    finally:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
    return _read(path) or key
