"""Where kernels and images are kept: one directory per entry, there whole or not at all.

    <root>/kernels/<entry>/   vmlinux, bzImage, modules.cpio, meta.json
    <root>/images/<entry>/    root.erofs, meta.json
    <root>/work/<kind>-<entry>/       an entry being made; renamed into place when everything in it is on the disk
    <root>/work/<kind>-<entry>.lock   held by the process that makes it

An interrupted build leaves only its work directory, which the next build of the same entry deletes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from microvm._os.filelock import file_lock
from microvm.errors import ConfigError, MicroVMError

# Called with a sentence and how far along it is (0 to 1, None when that is not known), from the caller's thread.
Progress = Callable[[str, float | None], None]

META: Final = "meta.json"
META_MAX: Final = 1 << 20  # a cache entry is data of another process: no more of it is read
_ENTRY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}\Z")


def quiet(message: str, fraction: float | None) -> None:
    """The progress callback that shows nothing."""


def root() -> Path:
    """``$MICROVM_CACHE``, or ``microvm`` under ``$XDG_CACHE_HOME`` (``%LOCALAPPDATA%``), or ``~/.cache/microvm``."""
    if chosen := os.environ.get("MICROVM_CACHE"):
        return Path(chosen)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if base := os.environ.get(variable):
            return Path(base) / "microvm"
    return Path.home() / ".cache" / "microvm"


def entry_path(kind: str, entry: str) -> Path:
    """The directory of an entry, existing or not. Raises ConfigError for a name that could leave the cache."""
    if not _ENTRY_NAME.match(entry):
        raise ConfigError("name", entry, "letters, digits and . _ + ~ - only")
    return root() / kind / entry


def read_meta(directory: Path) -> dict[str, Any] | None:
    """The entry's ``meta.json``, or None when it is missing or not a JSON object."""
    try:
        with open(directory / META, "rb") as file:
            meta = json.loads(file.read(META_MAX))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) else None


def entries(kind: str) -> list[tuple[Path, dict[str, Any]]]:
    """Every complete entry of a kind with its meta data, newest first."""
    try:
        found = [(path, read_meta(path)) for path in (root() / kind).iterdir()]
    except OSError:
        return []
    complete = [(path, meta) for path, meta in found if meta is not None]
    return sorted(complete, key=lambda item: (str(item[1].get("created", "")), item[0].name), reverse=True)


def obtain(
    kind: str, entry: str, make: Callable[[Path], dict[str, Any]], *, force: bool = False, progress: Progress = quiet
) -> Path:
    """The entry's directory, calling ``make(work_directory)`` to fill it when it is not there (or with ``force``).

    ``make`` returns the meta data. Two processes that ask at once make it once: the second waits. What is in the work
    directory is synchronised before it is renamed into place, so a power cut does not leave a torn entry.
    """
    final = entry_path(kind, entry)
    if not force and read_meta(final) is not None:
        return final
    work = root() / "work" / f"{kind}-{entry}"
    work.parent.mkdir(parents=True, exist_ok=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(work.with_name(work.name + ".lock")) as waited:
        if (waited or not force) and read_meta(final) is not None:
            return final
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            meta = make(work)
            _write(work / META, json.dumps(meta, indent=1, sort_keys=True).encode() + b"\n")
            _sync_tree(work)
            _replace(work, final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    progress(f"{entry} is ready", 1.0)
    return final


def remove(kind: str, entry: str) -> None:
    """Delete an entry; it disappears at once, whole. Raises ConfigError when there is none of that name."""
    final = entry_path(kind, entry)
    if not final.is_dir():
        raise ConfigError("name", entry, f"no such entry among the {kind}")
    trash = root() / "work" / f"{kind}-{entry}.old"
    trash.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(final, trash)
    shutil.rmtree(trash, ignore_errors=True)


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A directory under the cache for intermediate files, deleted afterwards. The caller holds the entry's lock."""
    path = root() / "work" / f"{name}.{os.getpid()}.scratch"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class MissingTools(MicroVMError):
    """Programs or headers that a build needs are not installed; ``packages`` are the Debian packages that have them."""

    def __init__(self, purpose: str, missing: list[str], packages: list[str]) -> None:
        self.missing = missing
        self.packages = packages
        super().__init__(f"{purpose} needs {', '.join(missing)} (apt-get install {' '.join(packages)})")


def need_tools(purpose: str, tools: dict[str, str]) -> None:
    """Raise MissingTools unless every program (or absolute path) in ``tools`` exists; its values are packages."""
    missing = [tool for tool in tools if not (os.path.exists(tool) if os.path.isabs(tool) else shutil.which(tool))]
    if missing:
        raise MissingTools(purpose, missing, sorted({tools[tool] for tool in missing}))


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _replace(work: Path, final: Path) -> None:
    old = work.with_name(work.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(work, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for base, _, files in os.walk(directory):
        for name in files:
            _sync(Path(base) / name)
        _sync(Path(base))


def _sync(path: Path) -> None:
    try:
        # Windows has no directory handles here, and wants the file writable to flush it.
        fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
