"""The guest side, built once per run: the program of `bench/guest`, static, as the only file of an initial ramdisk."""

from __future__ import annotations

import stat
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MUSL = ["musl-gcc", "-static", "-idirafter", "/usr/include", "-idirafter", "/usr/include/x86_64-linux-gnu"]


class GuestSide:
    """``initrd``: the ramdisk file. ``tsc_khz``: the rate of the host's TSC. ``folder``: for disks and sockets."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="microvm-bench-")
        self.folder = Path(self._folder.name)
        program, counter = self.folder / "bench", self.folder / "tsc"
        sources = [HERE / "guest" / name for name in ("main.c", "programs.c", "io.c")]
        subprocess.run([*MUSL, "-O2", "-o", program, *sources], check=True)
        subprocess.run(["cc", "-O2", "-o", counter, HERE / "peers" / "tsc.c"], check=True)
        self.tsc_khz = int(subprocess.run([counter], check=True, capture_output=True).stdout)
        self.initrd = self.folder / "initrd.cpio"
        self.initrd.write_bytes(_cpio(program.read_bytes()))
        self.disk = self.folder / "disk.raw"
        with open(self.disk, "wb") as file:  # real blocks: holes would be faster than any disk
            for _ in range(64):
                file.write(b"\xa5" * (1 << 20))

    def close(self) -> None:
        self._folder.cleanup()


def _cpio(init: bytes) -> bytes:
    """A "newc" archive with /init, /dev, /proc and the console device."""
    entries = [
        ("dev", stat.S_IFDIR | 0o755, 0, 0, b""),
        ("proc", stat.S_IFDIR | 0o755, 0, 0, b""),
        ("dev/console", stat.S_IFCHR | 0o600, 5, 1, b""),
        ("init", stat.S_IFREG | 0o755, 0, 0, init),
        ("TRAILER!!!", 0, 0, 0, b""),
    ]
    out = bytearray()
    for number, (name, mode, major, minor, data) in enumerate(entries, 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)
