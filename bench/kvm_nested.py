"""Boot to user space in the nested setting: our KVM backend beside QEMU with KVM, on one kernel and initial ramdisk.

    python -m bench.kvm_nested [--rounds N] [--json FILE] [--timeout S] [--with-exits]

A machine whose own KVM is missing or only emulates runs both in a first-level guest of QEMU's software CPU, which has
a working KVM (tests/nested/l1.py); QEMU, its libraries and firmware go along. ``--here`` uses this machine's KVM.
Runs take turns; figures are medians. Goal: at or below QEMU's. Time there is emulated: only the ratio says something.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import microvm
from bench.machine import Child, Setup
from bench.measures import warm_boot
from bench.ours import CMDLINE, Ours

QEMU = "qemu-system-x86_64"
FIRMWARE = Path("/usr/share/qemu")
FIRMWARE_FILES = ("bios-microvm.bin", "qboot.rom", "linuxboot_dma.bin", "linuxboot.bin", "pvh.bin", "kvmvapic.bin")
MEMORY_MIB = 128
# What each way of starting QEMU adds; the fastest of them is what we compare with.
PEERS = {
    "qemu": ("microvm,acpi=off,pic=off,pit=off,rtc=off", ["-cpu", "host"]),
    "qemu default": ("microvm", ["-cpu", "host"]),
}
# No contestants: what the interpreter itself takes of a new process's time.
PYTHON, IMPORTS = "(python, empty)", "(python, imports)"
MARK = "@@figures "


def qemu(setup: Setup, machine: str, extra: Sequence[str]) -> Child:
    words = [
        QEMU,
        "-M",
        machine,
        "-accel",
        "kvm",
        "-L",
        str(FIRMWARE),
        *extra,
        "-m",
        str(setup.memory_mib),
        "-nodefaults",
    ]
    words += ["-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]
    words += ["-global", "virtio-mmio.force-legacy=false", "-kernel", str(setup.kernel)]
    return Child([*words, "-initrd", str(setup.initrd), "-append", CMDLINE])


def measure(setup: Setup, rounds: int) -> dict[str, list[float]]:
    """Seconds from the start to the guest's first line, by contestant; taking turns."""

    def child(start: Callable[[], Child]) -> float:
        with start() as running:
            return running.watch("M")[0]

    def command(*words: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True)
        return time.perf_counter() - started

    contestants: dict[str, Callable[[], float]] = {
        "library": lambda: warm_boot(setup, "kvm"),
        "new process": lambda: child(lambda: Ours("kvm").start(setup)),
    }
    contestants[PYTHON] = lambda: command("-c", "pass")
    contestants[IMPORTS] = lambda: command("-c", "import microvm; microvm.MicroVM, microvm.MachineConfig")
    for name, (machine, extra) in PEERS.items():
        contestants[name] = lambda machine=machine, extra=extra: child(lambda: qemu(setup, machine, extra))  # type: ignore[misc]
    runs: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, boot in contestants.items():
            seconds = boot()
            if number:  # the first time reads files and compiles
                runs[name].append(seconds)
            print(f"@@run {number} {name} {seconds:.3f}", flush=True)
    return runs


def files(initrd: Path, kernel: Path, loop: Path | None) -> dict[str, Path]:
    """What the first-level guest needs besides Python and the package."""
    program = shutil.which(QEMU)
    assert program is not None
    found = {"bin/" + QEMU: Path(program), "bench/initrd": initrd, "bench/vmlinux": kernel}
    for path in re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", program], capture_output=True, text=True).stdout):
        found[path.lstrip("/")] = Path(os.path.realpath(path))
    for name in FIRMWARE_FILES:
        if (FIRMWARE / name).exists():
            found[str(FIRMWARE / name).lstrip("/")] = Path(os.path.realpath(FIRMWARE / name))
    if loop is not None:
        found["bench/kvm_exits"] = loop
    return found


def table(runs: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(seconds) for name, seconds in runs.items()}
    best = min(medians[name] for name in PEERS)
    lines = ["boot to user space         median     best   x QEMU   goal"]
    for name, median in medians.items():
        goal = "" if name in PEERS or name in (PYTHON, IMPORTS) else "<= 1   " + ("met" if median <= best else "MISSED")
        lines.append(f"{name:24} {median:6.3f} s {min(runs[name]):6.3f} s {median / best:8.2f}   {goal}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kvm_nested", description="boot beside QEMU with KVM")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds for the first-level guest (default 500)")
    parser.add_argument("--with-exits", action="store_true", help="run bench/kvm_exits.py there as well")
    parser.add_argument("--here", action="store_true", help="use this machine's own KVM")
    parser.add_argument("--inside", nargs=2, metavar=("KERNEL", "INITRD"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inside:
        kernel, initrd = map(Path, args.inside)
        runs = measure(Setup(kernel, initrd, memory_mib=MEMORY_MIB), args.rounds)
        print(MARK + json.dumps(runs), flush=True)
        if args.with_exits:
            loop = ["--loop", "/bench/kvm_exits", "--count", "5000"]
            return subprocess.call([sys.executable, "bench/kvm_exits.py", *loop])
        return 0
    return outside(args)


def outside(args: argparse.Namespace) -> int:
    from bench.guestside import GuestSide
    from bench.kvm_exits import compile_loop

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "nested"))
    import l1

    reason = "" if args.here else l1.missing()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    # An installed package has its bytecode.
    for folder in (Path(microvm.__file__).parent, Path(__file__).parent):
        compileall.compile_dir(str(folder), quiet=2)
    guest = GuestSide()
    try:
        with tempfile.TemporaryDirectory() as folder:
            kernel = l1.kernel()
            assert kernel is not None
            image = kernel.with_name("vmlinux")
            if args.here:
                runs = measure(Setup(image, guest.initrd, memory_mib=MEMORY_MIB), args.rounds)
                output = MARK + json.dumps(runs)
            else:
                loop = compile_loop(Path(folder)) if args.with_exits else None
                inside = ["-m", "bench.kvm_nested", "--rounds", str(args.rounds)]
                inside += ["--with-exits"] * args.with_exits + ["--inside", "/bench/vmlinux", "/bench/initrd"]
                result = l1.run(inside, {}, args.timeout, memory_mib=2048, files=files(guest.initrd, image, loop))
                output = result.output
    finally:
        guest.close()
    figures = next((line for line in output.splitlines() if line.startswith(MARK)), None)
    if figures is None:
        print(output[-4000:], file=sys.stderr)
        return 1
    runs = json.loads(figures[len(MARK) :])
    print(table(runs))
    print("\n".join(line for line in output.splitlines() if re.match(r"(pio|mmio|doorbell) ", line)))
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
