"""The kernels this machine has: built, fetched from Debian, or given as a file."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import os
from pathlib import Path
from typing import Any, Final

from microvm.errors import ConfigError
from microvm.images import cache, debian, distro_kernel, kernelbuild
from microvm.images.cache import Progress, quiet

KIND: Final = "kernels"
PACKAGES: Final = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
_PREFERENCE: Final = ("tuned", "cloud", "generic")


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable kernel.

    ``path`` is what to boot: an uncompressed ELF ``vmlinux`` when there is one, else a bzImage. ``initrd`` is an
    uncompressed cpio with the modules that the guest agent loads (``/lib/modules-boot/NN-name.ko``, in name order), or
    None when all it needs is built in. ``kind`` is ``tuned``, ``cloud``, ``generic`` or ``file``.
    """

    name: str
    path: Path
    initrd: Path | None
    version: str
    kind: str
    bzimage: Path | None = None

    @property
    def size(self) -> int:
        """Bytes on disk of the kernel itself."""
        return self.path.stat().st_size


def list() -> tuple[Kernel, ...]:
    """Every kernel in the cache, newest first."""
    found = (_from_entry(path, meta) for path, meta in cache.entries(KIND))
    return tuple(kernel for kernel in found if kernel is not None)


def default() -> Kernel:
    """The tuned kernel when it is built, else a fetched one. Raises ConfigError that says what to run."""
    for kind in _PREFERENCE:
        if kernel := _newest(kind):
            return kernel
    raise ConfigError("kernel", "", "none here yet: run `microvm kernel fetch cloud`, or `microvm kernel build`")


def resolve(which: str | os.PathLike[str] | None) -> Kernel:
    """The kernel that a user named: a kind, an entry of the cache, a kernel file, or a Debian kernel package file.

    None or an empty string is ``default()``. Raises ConfigError when there is no such thing.
    """
    text = os.fspath(which) if which is not None else ""
    if not text:
        return default()
    if text in _PREFERENCE:
        if kernel := _newest(text):
            return kernel
        command = "microvm kernel build" if text == "tuned" else f"microvm kernel fetch {text}"
        raise ConfigError("kernel", text, f"not here yet: run `{command}`")
    if os.sep not in text:
        for kernel in list():
            if kernel.name == text:
                return kernel
    path = Path(text)
    if not path.exists():
        raise ConfigError("kernel", text, "no such file, and no kernel of that name (`microvm kernel list`)")
    if not path.is_file():
        raise ConfigError("kernel", text, "not a file")
    if path.suffix == ".deb":
        return add_package(path)
    return Kernel(name=path.name, path=path, initrd=None, version="", kind="file")


def build(progress: Progress = quiet, *, source: Path | None = None, jobs: int = 0, force: bool = False) -> Kernel:
    """Build the tuned kernel unless this configuration of it is built. Minutes of all CPUs.

    Raises MissingTools naming the Debian packages to install, HostError with the compiler's message.
    """
    archive = source or kernelbuild.find_source()
    if not archive.is_file():
        raise ConfigError("source", str(archive), "no such file")
    config = kernelbuild.fragment()

    def make(out: Path) -> dict[str, Any]:
        return _stamp(kernelbuild.build(archive, config, out, progress, jobs))

    entry = f"tuned-{kernelbuild.key(archive, config)}"
    return _load(cache.obtain(KIND, entry, make, force=force, progress=progress))


def fetch(kind: str, progress: Progress = quiet, *, force: bool = False) -> Kernel:
    """Download Debian's ``cloud`` or ``generic`` kernel with apt and unpack it, without installing it.

    Raises ConfigError for another kind, MissingTools without apt, HostError when the download fails.
    """
    if kind not in PACKAGES:
        raise ConfigError("kernel", kind, f"one of {', '.join(PACKAGES)}")
    package = debian.real_package(PACKAGES[kind])

    def make(out: Path) -> dict[str, Any]:
        with cache.scratch(f"fetch-{kind}") as scratch:
            progress(f"downloading {package.name} {package.version}", None)
            archive = debian.download(package, scratch)
            return _stamp(distro_kernel.unpack(archive, out, kind, progress) | {"package": package.name})

    entry = f"{kind}-{package.version.replace(':', '+')}"
    return _load(cache.obtain(KIND, entry, make, force=force, progress=progress))


def add_package(archive: Path, progress: Progress = quiet) -> Kernel:
    """Unpack a Debian kernel package file (``linux-image-*.deb``) into the cache, keyed by its content."""
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def make(out: Path) -> dict[str, Any]:
        return _stamp(distro_kernel.unpack(archive, out, "file", progress) | {"package": archive.name})

    return _load(cache.obtain(KIND, f"deb-{digest[:12]}", make, progress=progress))


def remove(name: str) -> None:
    """Delete one kernel from the cache, by its entry name. Raises ConfigError when it is not there."""
    cache.remove(KIND, name)


def _newest(kind: str) -> Kernel | None:
    kernels = [kernel for kernel in list() if kernel.kind == kind]
    if kind == "tuned":
        # After an upgrade the kernel of this version's configuration goes before a newer build of another one.
        current = _fragment_hash()
        for path, meta in cache.entries(KIND):
            if meta.get("fragment") == current and (kernel := _from_entry(path, meta)):
                return kernel
    return kernels[0] if kernels else None


@functools.cache
def _fragment_hash() -> str:
    return kernelbuild.config_hash(kernelbuild.fragment())


def _stamp(meta: dict[str, Any]) -> dict[str, Any]:
    return meta | {"created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def _load(path: Path) -> Kernel:
    kernel = _from_entry(path, cache.read_meta(path) or {})
    if kernel is None:
        raise ConfigError("kernel", str(path), "the cache entry is damaged: remove it and make it again")
    return kernel


def _from_entry(path: Path, meta: dict[str, Any]) -> Kernel | None:
    vmlinux, bzimage, modules = path / "vmlinux", path / "bzImage", path / "modules.cpio"
    image = vmlinux if vmlinux.is_file() else bzimage
    if not image.is_file():
        return None
    return Kernel(
        name=path.name,
        path=image,
        initrd=modules if modules.is_file() else None,
        version=str(meta.get("version", "")),
        kind=str(meta.get("kind", "file")),
        bzimage=bzimage if bzimage.is_file() else None,
    )
