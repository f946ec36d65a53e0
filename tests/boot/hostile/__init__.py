"""The guest that does its worst, compiled on demand."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

FLAGS = [
    *(
        "-m32",
        "-march=i686",
        "-O2",
        "-Wall",
        "-Wextra",
        "-ffreestanding",
        "-nostdlib",
        "-static",
        "-fno-pie",
        "-no-pie",
    ),
    *("-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-mno-sse", "-mno-mmx"),
    *("-Wl,-Ttext-segment=0x100000", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-N"),
]


def build(folder: Path) -> Path | None:
    """The kernel, an ELF file, or None without a compiler. x86-64's loader wants a 64-bit header: objcopy makes one."""
    compiler, objcopy = shutil.which("gcc"), shutil.which("objcopy")
    if compiler is None or objcopy is None:
        return None
    source, narrow, kernel = Path(__file__).with_name("hostile.c"), folder / "hostile.32", folder / "hostile"
    subprocess.run([compiler, *FLAGS, str(source), "-o", str(narrow)], check=True, capture_output=True)
    convert = [objcopy, "-I", "elf32-i386", "-O", "elf64-x86-64", str(narrow), str(kernel)]
    subprocess.run(convert, check=True, capture_output=True)
    return kernel
