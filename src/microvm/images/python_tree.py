"""Debian with the full python3, as a directory, made without root and without running a package's scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from microvm.errors import HostError
from microvm.images import cache, userland

SUITE: Final = "bookworm"
PACKAGES: Final = ("python3", "busybox-static", "base-files", "base-passwd", "ca-certificates", "netbase", "tzdata")
# Nothing in a sandbox reads these; character set converters alone are 8 MB.
_EXCLUDED: Final = (
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/perl5",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "usr/share/python3/debpython",
    "usr/share/zoneinfo/right",
    "usr/share/zoneinfo/posix",
    "var/lib/dpkg",
    "var/lib/apt",
    "var/cache",
    "var/log",
    "etc/apt",
    "etc/dpkg",
)
_TOOLS: Final = {"mmdebstrap": "mmdebstrap", "apt-get": "apt", "dpkg-deb": "dpkg"}
_LOADER: Final = "lib64/ld-linux-x86-64.so.2"
_LIBRARIES: Final = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")

FINGERPRINT: Final = repr((SUITE, PACKAGES, _EXCLUDED))  # changes when the packages do


def make(tree: Path, progress: cache.Progress) -> None:
    """Fill the empty directory ``tree``. Downloads 25 MB. Raises MissingTools, HostError."""
    cache.need_tools("building the python image", _TOOLS)
    progress("downloading and unpacking Debian packages", None)
    command = [
        "mmdebstrap",
        "--quiet",
        # Unpacks as whoever runs it: no user namespace, no mount, no device node, so it works in any container.
        "--mode=chrootless",
        "--variant=extract",
        "--format=directory",
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude=/{path}/*" for path in _EXCLUDED if path.startswith("usr/")),
        SUITE,
        str(tree),
    ]
    _run(command, {}, "mmdebstrap")
    shutil.rmtree(tree / "dev")
    for path in _EXCLUDED:
        shutil.rmtree(tree / path, ignore_errors=True)
    userland.merge_usr(tree)
    userland.add_common(tree)
    userland.add_busybox(tree, progress)
    userland.link(tree, "usr/bin/python", "python3")
    progress("collecting certificates", None)
    _certificates(tree)
    progress("compiling the Python library", None)
    _compile(tree)


def _certificates(tree: Path) -> None:
    """What update-ca-certificates does, without running it: one bundle, and a link by hash for each certificate."""
    source = tree / "usr/share/ca-certificates/mozilla"
    target = tree / "etc/ssl/certs"
    target.mkdir(parents=True, exist_ok=True)
    bundle = []
    for certificate in sorted(source.glob("*.crt")):
        bundle.append(certificate.read_text())
        userland.link(tree, f"etc/ssl/certs/{certificate.stem}.pem", os.path.relpath(certificate, target))
    (target / "ca-certificates.crt").write_text("".join(bundle))
    _run_inside(tree, ["usr/bin/openssl", "rehash", str(target)], {"OPENSSL_CONF": os.devnull})


def _compile(tree: Path) -> None:
    """Compile every module, marked "unchecked": the guest then does not compare them with their sources."""
    library = next(tree.glob("usr/lib/python3.*"))
    for cached in list(library.rglob("__pycache__")):
        shutil.rmtree(cached)
    interpreter = f"usr/bin/{library.name}"
    options = ["-m", "compileall", "-q", "-j0", "-s", str(tree), "-p", "/", "--invalidation-mode", "unchecked-hash"]
    places = [str(library), str(tree / "usr/lib/python3/dist-packages")]
    _run_inside(tree, [interpreter, *options, *places], {"PYTHONHOME": str(tree / "usr"), "PYTHONNOUSERSITE": "1"})


def _run_inside(tree: Path, command: list[str], environment: dict[str, str]) -> None:
    """Run a program of the tree with the tree's own loader and libraries: no chroot, so no root."""
    libraries = ":".join(str(tree / path) for path in _LIBRARIES)
    program, *arguments = command
    loader = [str(tree / _LOADER), "--library-path", libraries, str(tree / program), *arguments]
    _run(loader, {"LD_LIBRARY_PATH": libraries, **environment}, program)


def _run(command: list[str], environment: dict[str, str], name: str) -> None:
    done = subprocess.run(
        command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        hint = "is the network there?" if name == "mmdebstrap" else ""
        raise HostError(name, done.returncode, lines[-1] if lines else "failed", hint)
