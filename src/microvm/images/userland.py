"""The files that every root file system of ours has: users, names, mount points, busybox."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from microvm.errors import HostError
from microvm.images import cache, debian

# Paths (no leading slash) that do not belong to root.
OWNERS: Final = {"home/user": (1000, 1000)}

_FILES: Final = {
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        "user:x:1000:1000:user:/home/user:/bin/sh\n"
    ),
    "etc/group": "root:x:0:\ntty:x:5:\nstaff:x:50:\nusers:x:100:\nnogroup:x:65534:\nuser:x:1000:\n",
    "etc/shadow": "root:*:19700:0:99999:7:::\nnobody:*:19700:0:99999:7:::\nuser:*:19700:0:99999:7:::\n",
    "etc/hostname": "microvm\n",
    "etc/hosts": "127.0.0.1 localhost microvm\n::1 localhost ip6-localhost\n",
    "etc/resolv.conf": "",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    "etc/shells": "/bin/sh\n",
    "etc/profile": (
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        'export PS1="\\u@\\h:\\w\\$ "\n'
    ),
}
_DIRECTORIES: Final = {
    "dev": 0o755,
    "etc": 0o755,
    "home": 0o755,
    "home/user": 0o755,
    "mnt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "usr/bin": 0o755,
    "usr/sbin": 0o755,
    "usr/local/bin": 0o755,
    "usr/local/lib": 0o755,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}

FINGERPRINT: Final = repr((OWNERS, _FILES, _DIRECTORIES))  # changes when the files do


def add_common(tree: Path) -> None:
    """Users root, nobody and user, names, and every directory that the guest mounts something on."""
    for path, mode in _DIRECTORIES.items():
        directory = tree / path
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(mode)
    for path, text in _FILES.items():
        file = tree / path
        file.unlink(missing_ok=True)
        file.write_text(text)
        file.chmod(0o640 if path == "etc/shadow" else 0o644)
    link(tree, "etc/mtab", "../proc/self/mounts")


def link(tree: Path, path: str, target: str) -> None:
    """Make a symbolic link unless something of that name is there."""
    place = tree / path
    place.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(place):
        place.symlink_to(target)


def find_busybox(progress: cache.Progress) -> bytes:
    """A static busybox: this machine's when it has one, else the one in Debian's package, downloaded."""
    for name in ("/bin/busybox", "/usr/lib/busybox/busybox-static"):
        path = Path(name)
        if path.is_file() and is_static_elf(data := path.read_bytes()):
            return data
    package = debian.candidate("busybox-static")
    with cache.scratch("busybox") as scratch:
        progress(f"downloading {package.name} {package.version}", None)
        archive = debian.download(package, scratch)
        for _, data in debian.package_files(archive, lambda path: path.endswith("bin/busybox")):
            return data
    raise HostError("apt-get download", 1, "the busybox-static package has no busybox in it")


def is_static_elf(data: bytes) -> bool:
    """Whether this is an x86-64 program that needs no interpreter."""
    if data[:6] != b"\x7fELF\x02\x01" or data[18:20] != b"\x3e\0":
        return False
    table = int.from_bytes(data[32:40], "little")
    size, count = int.from_bytes(data[54:56], "little"), int.from_bytes(data[56:58], "little")
    return all(data[table + at * size : table + at * size + 4] != b"\3\0\0\0" for at in range(count))


def add_busybox(tree: Path, progress: cache.Progress, busybox: bytes | None = None) -> None:
    """Install busybox (given, or found) as /bin/busybox, and a link for each applet whose place is still free."""
    program = tree / "bin/busybox"
    if busybox is not None or not program.is_file():
        program.write_bytes(find_busybox(progress) if busybox is None else busybox)
        program.chmod(0o755)
    done = subprocess.run([str(program), "--list-full"], capture_output=True, text=True)
    if done.returncode:
        raise HostError("busybox --list-full", done.returncode, "cannot list its applets: is this an x86-64 Linux?")
    for applet in done.stdout.split():
        if applet.startswith(("/", "..")) or "/../" in applet:
            continue
        name = Path(applet).name
        if name in ("busybox", "linuxrc") or any(
            os.path.lexists(tree / where / name) for where in ("usr/bin", "usr/sbin")
        ):
            continue
        link(tree, applet, "/bin/busybox")


def merge_usr(tree: Path) -> None:
    """Make /bin, /sbin, /lib and /lib64 links into /usr, moving there what they hold."""
    for name in ("bin", "sbin", "lib", "lib64"):
        place, real = tree / name, tree / "usr" / name
        if place.is_symlink():
            continue
        real.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            _move_into(place, real)
            place.rmdir()
        place.symlink_to(f"usr/{name}")


def _move_into(source: Path, target: Path) -> None:
    for child in list(source.iterdir()):
        other = target / child.name
        if child.is_dir() and not child.is_symlink() and other.is_dir():
            _move_into(child, other)
            child.rmdir()
        else:
            shutil.move(str(child), str(other))
