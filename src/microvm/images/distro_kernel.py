"""Turn a distribution's kernel package into a cache entry: the kernel, unpacked, and the modules a sandbox needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from microvm.errors import ConfigError
from microvm.images import bzimage, debian, modules
from microvm.images.cache import Progress, quiet

_KERNEL: Final = re.compile(r"boot/vmlinuz-([A-Za-z0-9.+~_-]+)\Z")
_MODULE: Final = re.compile(r"(?:usr/)?lib/modules/[^/]+/.*\.ko(?:\.[a-z0-9]+)?\Z")
# Read and unpacked are only modules that can matter: a package has 4,000 of them.
_CANDIDATES: Final = re.compile(r"/(?:drivers/(?:virtio|block|char|net)|net/(?:core|vmw_vsock)|fs|lib|crypto|arch)/")


def unpack(archive: Path, out: Path, kind: str, progress: Progress = quiet) -> dict[str, Any]:
    """Put bzImage, vmlinux (when its compression is known) and modules.cpio into ``out``; return the meta data.

    Raises ConfigError when the archive is no sound Debian package with a kernel in it, BootError for a kernel in it
    that is damaged.
    """
    progress(f"unpacking {archive.name}", None)
    version, image = "", b""
    available: dict[str, bytes] = {}
    for path, data in debian.package_files(archive, _wanted):
        if found := _KERNEL.match(path):
            version, image = found[1], data
        else:
            available[modules.module_name(path)] = modules.unpacked(path, data)
    if not image:
        raise ConfigError("archive", str(archive), "holds no kernel (boot/vmlinuz-...)")
    (out / "bzImage").write_bytes(image)
    progress("unpacking the kernel image", None)
    if vmlinux := bzimage.extract_vmlinux(image):
        (out / "vmlinux").write_bytes(vmlinux)
    order = modules.load_order(available, modules.BOOT_MODULES)
    if order:
        (out / "modules.cpio").write_bytes(modules.modules_cpio(available))
    return {"kind": kind, "version": version, "modules": order}


def _wanted(path: str) -> bool:
    return bool(_KERNEL.match(path) or (_MODULE.match(path) and _CANDIDATES.search(path)))
