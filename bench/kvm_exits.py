"""Exits a second through the package against a minimal C loop on the same /dev/kvm, taking turns in one run.

    python bench/kvm_exits.py [--json] [--count N] [--rounds N] [--loop COMPILED]

Goal: at least 0.7 of the C loop's rate. ``doorbell`` writes never reach Python: they measure KVM itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from microvm._os.event import Event
from microvm.bus import Bus
from microvm.hypervisor.base import PartitionConfig, Registers, Segment
from microvm.hypervisor.kvm import KvmHypervisor
from microvm.hypervisor.kvm.vcpu import KvmVcpu
from microvm.memory import GuestMemory

SOURCE = Path(__file__).with_suffix(".c")
KINDS = ("pio", "mmio", "doorbell")
CODE = 0x1000
WINDOW = 0xD000_0000
FLAT = Segment(0, 0, 0xFFFF_FFFF, 0x8093)
FLAT_CODE = Segment(0, 0, 0xFFFF_FFFF, 0x809B)


class Device:
    """The cheapest device: adds up what it is told; its second port stops the vCPU."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.sum = 0
        self._vcpu = vcpu

    def pio_read(self, offset: int, size: int) -> int:
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self.sum += value
        if offset:
            self._vcpu.kick()

    def mmio_read(self, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.sum += value


def guest(kind: str, count: int) -> bytes:
    """The same program as in kvm_exits.c."""
    code = b"\x66\xb9" + count.to_bytes(4, "little") + b"\x66\xbf\x00\x00\x00\xd0\xba\xf8\x03"
    body = (b"\xee" if kind == "pio" else b"\x67\x66\x89\x07") + b"\x66\x49\x75"
    return code + body + (-(len(body) + 1) & 0xFF).to_bytes(1, "little") + b"\x42\xee\xeb\xfe"


def ours(kind: str, count: int) -> float:
    """Seconds for ``count`` exits through the package."""
    partition = KvmHypervisor().create_partition(PartitionConfig())
    memory = GuestMemory.allocate(1 << 20)
    bell = Event()
    try:
        partition.map(0, memory.regions[0])
        if kind == "doorbell":
            partition.doorbell(WINDOW, 4, 0, bell)
        vcpu = partition.create_vcpu(0)
        memory.write(CODE, guest(kind, count))
        device = Device(vcpu)
        bus = Bus()
        bus.map_pio(0x3F8, 2, device)
        bus.map_mmio(WINDOW, 0x1000, device)
        vcpu.set_registers(Registers(rip=CODE, cs=FLAT_CODE, ds=FLAT, es=FLAT, ss=FLAT, fs=FLAT, gs=FLAT))
        started = time.perf_counter()
        vcpu.run(bus)
        return time.perf_counter() - started
    finally:
        partition.close()
        memory.close()
        bell.close()


def theirs(loop: Path, kind: str, count: int) -> float:
    """Seconds for ``count`` exits through the C loop."""
    return float(subprocess.run([loop, kind, str(count)], check=True, capture_output=True, text=True).stdout.split()[0])


def compile_loop(folder: Path) -> Path:
    """The C loop, static so that it runs in a nested guest as well."""
    target = folder / "kvm_exits"
    subprocess.run(["gcc", "-O2", "-static", "-o", str(target), str(SOURCE)], check=True)
    return target


def measure(loop: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        pairs = [(theirs(loop, kind, count), ours(kind, count)) for _ in range(rounds)]
        c, python = (count / statistics.median(column) for column in zip(*pairs, strict=True))
        results[kind] = {"c_per_second": c, "ours_per_second": python, "ratio": python / c}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", type=Path, help="the compiled C loop, where there is no compiler")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loop = options.loop or compile_loop(Path(folder))
        results = measure(loop, options.count, options.rounds)
    if options.json:
        print(json.dumps(results))
    else:
        for kind, row in results.items():
            c, python, ratio = row["c_per_second"], row["ours_per_second"], row["ratio"]
            print(f"{kind:9} C {c:9,.0f}/s   ours {python:9,.0f}/s   x {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
