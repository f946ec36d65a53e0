"""Build the tuned kernel: Debian's kernel source, ``make allnoconfig`` and ``data/kernel.fragment``.

The result is keyed by everything that decides it: the fragment, the source and the recipe below.
"""

from __future__ import annotations

import collections
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from microvm.errors import ConfigError, HostError
from microvm.images import cache

RECIPE: Final = 1  # raised when what is done with the same source and fragment changes
SOURCES: Final = Path("/usr/src")
_OBJECTS: Final = 1400  # compiled files in a build, for the progress display
_TOOLS: Final = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "tar": "tar",
    "xz": "xz-utils",
    "gzip": "gzip",
    "/usr/include/gelf.h": "libelf-dev",
}
# The kernel's own banner would otherwise carry the builder's name and the hour.
_REPRODUCIBLE: Final = {
    "KBUILD_BUILD_TIMESTAMP": "2024-01-01",
    "KBUILD_BUILD_USER": "microvm",
    "KBUILD_BUILD_HOST": "microvm",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
}


def fragment() -> bytes:
    """The committed configuration fragment."""
    return (resources.files("microvm") / "data" / "kernel.fragment").read_bytes()


def find_source() -> Path:
    """Debian's source archive, newest version first. Raises MissingTools when the package is not installed."""
    found = sorted(
        SOURCES.glob("linux-source-[0-9]*.tar.xz"),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)],
        reverse=True,
    )
    # The fragment is written and measured for 6.1; a newer source works but is not preferred.
    for path in found:
        if path.name.startswith("linux-source-6.1."):
            return path
    if not found:
        raise cache.MissingTools("building a kernel", ["the kernel source"], ["linux-source-6.1"])
    return found[0]


def source_version(source: Path) -> str:
    """The Debian package version that put the archive there, else its name and size."""
    package = re.sub(r"\.tar\..*$", "", source.name)
    if source.parent == SOURCES and shutil.which("dpkg-query"):
        done = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return f"{package} {done.stdout}"
    return f"{package} {source.stat().st_size}"


def key(source: Path, config: bytes) -> str:
    """Twelve hex digits that name one configuration of one source by this recipe."""
    text = f"{RECIPE}\n{source_version(source)}\n{config_hash(config)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_hash(config: bytes) -> str:
    """The hash of what a fragment says; its comments do not make another kernel."""
    said = re.findall(rb"^(?:CONFIG_\w+=.*|# CONFIG_\w+ is not set)$", config, re.MULTILINE)
    return hashlib.sha256(b"\n".join(said)).hexdigest()


def build(source: Path, config: bytes, out: Path, progress: cache.Progress, jobs: int = 0) -> dict[str, Any]:
    """Compile into ``out`` (vmlinux, bzImage, config) and return the entry's meta data. Takes minutes.

    ``jobs`` is how many compilers run at once, 0 for one per CPU. Raises MissingTools, HostError.
    """
    cache.need_tools("building a kernel", _TOOLS)
    with cache.scratch("kernel-build") as scratch:
        progress(f"unpacking {source.name}", None)
        tree = _unpack(source, scratch)
        objects = scratch / "objects"
        objects.mkdir()
        (scratch / "fragment").write_bytes(config)
        make = ["make", "-C", str(tree), f"O={objects}", "ARCH=x86_64"]
        if shutil.which("nice"):
            make = ["nice", *make]
        environment = {**os.environ, **_REPRODUCIBLE, "KCONFIG_ALLCONFIG": str(scratch / "fragment")}
        _run([*make, "allnoconfig"], environment, progress, "configuring", 0)
        dropped = dropped_options(config.decode(), (objects / ".config").read_text())
        if dropped:
            raise ConfigError("kernel.fragment", "", f"this source has no such option: {', '.join(dropped)}")
        workers = jobs or os.cpu_count() or 1
        _run([*make, f"-j{workers}", "bzImage"], environment, progress, "compiling the kernel", _OBJECTS)
        progress("stripping the kernel", None)
        _run(["objcopy", "-S", "-R", ".comment", str(objects / "vmlinux"), str(out / "vmlinux")], environment, progress)
        shutil.copyfile(objects / "arch/x86/boot/bzImage", out / "bzImage")
        shutil.copyfile(objects / "System.map", out / "System.map")
        shutil.copyfile(objects / ".config", out / "config")
        release = (objects / "include/config/kernel.release").read_text().strip()
    return {
        "kind": "tuned",
        "version": release,
        "source": source_version(source),
        "fragment": config_hash(config),
    }


def dropped_options(wanted: str, result: str) -> list[str]:
    """The ``CONFIG_X=value`` lines of ``wanted`` that the finished configuration does not have."""
    lines = set(result.splitlines())
    options = [line for line in wanted.splitlines() if re.match(r"CONFIG_\w+=(?!n$)", line)]
    return [option for option in options if option not in lines]


def _unpack(source: Path, into: Path) -> Path:
    try:
        # Far faster than tarfile on 1.3 GB in 80,000 files; the archive is the distribution's own.
        subprocess.run(["tar", "-xf", str(source), "-C", str(into)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise HostError("tar", error.returncode, f"cannot unpack {source}: {_last_line(error.stderr)}") from error
    trees = [path for path in into.iterdir() if (path / "Kconfig").is_file()]
    if not trees:
        raise ConfigError("source", str(source), "an archive of the Linux source with one top directory")
    return trees[0]


def _run(
    command: Sequence[str],
    environment: dict[str, str],
    progress: cache.Progress,
    what: str = "",
    total: int = 0,
) -> None:
    last: collections.deque[str] = collections.deque(maxlen=12)
    count = 0
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line.rstrip())
                if total and line.lstrip().startswith(("CC ", "AS ")):
                    count += 1
                    progress(what, min(count / total, 0.99))
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        said = next((text for text in reversed(last) if "error" in text.lower()), last[-1] if last else "")
        raise HostError(os.path.basename(command[0]), process.returncode, f"{what or command[0]} failed: {said}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no message"
