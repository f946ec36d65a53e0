"""Debian packages without installing them: ask apt for one, and read the files inside."""

from __future__ import annotations

import dataclasses
import io
import lzma
import re
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Final, Literal, cast

from microvm.errors import ConfigError, HostError
from microvm.images import cache

ARCHIVE_MAX: Final = 512 << 20  # a .deb larger than this is no kernel
UNPACKED_MAX: Final = 4 << 30  # a small archive that unpacks to more than this is a decompression bomb
MEMBERS_MAX: Final = 100_000
_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60
_TAR_MODES: Final[dict[str, Literal["r|", "r|xz", "r|gz"]]] = {"": "r|", "xz": "r|xz", "gz": "r|gz"}
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+\Z")


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """One version of a Debian package as apt knows it."""

    name: str
    version: str


def real_package(meta: str) -> Package:
    """The package that a meta-package such as ``linux-image-cloud-amd64`` stands for, in its candidate version.

    Raises MissingTools without apt, ConfigError when apt does not know the package.
    """
    cache.need_tools("fetching a Debian kernel", {"apt-get": "apt", "apt-cache": "apt"})
    text = _apt("apt-cache", "show", "--no-all-versions", meta)
    return parse_real_package(meta, text)


def candidate(name: str) -> Package:
    """The version of a package that apt would install. Raises MissingTools without apt, ConfigError if unknown."""
    cache.need_tools(f"fetching {name}", {"apt-get": "apt", "apt-cache": "apt"})
    found = re.search(r"^Version: (\S+)$", _apt("apt-cache", "show", "--no-all-versions", name), re.MULTILINE)
    if not found:
        raise ConfigError("package", name, "apt knows no version of it (apt-get update?)")
    return Package(name, found[1])


def parse_real_package(meta: str, text: str) -> Package:
    """The first dependency that carries the version with it, out of ``apt-cache show``'s answer."""
    found = re.search(r"^Depends:.*?([a-z0-9][a-z0-9+.-]+) \(= ([^)\s]+)\)", text, re.MULTILINE)
    if not found:
        raise ConfigError("package", meta, "apt knows no version of it (apt-get update?)")
    return Package(found[1], found[2])


def download(package: Package, into: Path) -> Path:
    """Download the package's archive into an empty directory with ``apt-get download``. Raises HostError."""
    assert _NAME.match(package.name)
    _apt("apt-get", "-q", "download", f"{package.name}={package.version}", cwd=into)
    archives = sorted(into.glob("*.deb"))
    if not archives:
        raise HostError("apt-get download", 1, f"left no archive of {package.name}")
    return archives[0]


def _apt(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        hint = "is the network there, and did apt-get update run?"
        raise HostError(" ".join(command[:2]), done.returncode, lines[0] if lines else "failed", hint)
    return done.stdout


def ar_members(file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of every member of a Unix archive. Raises ConfigError for anything else."""
    file.seek(0, io.SEEK_END)
    end = file.tell()
    file.seek(0)
    if file.read(8) != _AR_MAGIC:
        raise ConfigError("archive", getattr(file, "name", ""), "not a Debian package")
    offset = 8
    while offset < end:
        file.seek(offset)
        header = file.read(_AR_HEADER)
        size_text = header[48:58].strip()
        if len(header) < _AR_HEADER or header[58:] != b"`\n" or not size_text.isdigit():
            raise ConfigError("archive", getattr(file, "name", ""), "damaged: a member header is not readable")
        size = int(size_text)
        offset += _AR_HEADER
        if size > end - offset:
            raise ConfigError("archive", getattr(file, "name", ""), "truncated")
        yield header[:16].decode("ascii", "replace").strip().rstrip("/"), offset, size
        offset += size + size % 2


class _Window(io.RawIOBase):
    """A part of a file as a file, for decompressors that read to the end."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file = file
        self._left = size
        file.seek(offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._left))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)


def package_files(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Path (without a leading slash) and content of every regular file in the package for which ``wanted`` is true.

    Nothing is written anywhere, so a hostile path can do no harm beyond its name; names that climb are refused all the
    same. Raises ConfigError for what is not a sound Debian package.
    """
    if archive.stat().st_size > ARCHIVE_MAX:
        raise ConfigError("archive", str(archive), f"larger than {ARCHIVE_MAX >> 20} MiB")
    with open(archive, "rb") as file:
        for name, offset, size in ar_members(file):
            if not name.startswith("data.tar"):
                continue
            suffix = name.removeprefix("data.tar").lstrip(".")
            if suffix not in _TAR_MODES:
                raise ConfigError("archive", str(archive), f"compressed with {suffix}, which cannot be read here")
            stream = io.BufferedReader(_Window(file, offset, size), 1 << 20)
            try:
                with tarfile.open(fileobj=cast(IO[bytes], stream), mode=_TAR_MODES[suffix]) as tar:
                    yield from _tar_files(tar, wanted, archive)
            except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError) as error:
                raise ConfigError("archive", str(archive), f"damaged: {error}") from error
            return
    raise ConfigError("archive", str(archive), "not a Debian package: it has no data.tar")


def _tar_files(tar: tarfile.TarFile, wanted: Callable[[str], bool], archive: Path) -> Iterator[tuple[str, bytes]]:
    total = 0
    for count, member in enumerate(tar):
        total += member.size
        if count >= MEMBERS_MAX or total > UNPACKED_MAX:
            raise ConfigError("archive", str(archive), "unpacks to more than any kernel package does")
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError("archive", str(archive), f"holds a path that climbs: {member.name}")
        if member.isreg() and wanted(str(path)):
            content = tar.extractfile(member)
            assert content is not None
            yield str(path), content.read()
