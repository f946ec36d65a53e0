"""What the WHP backend costs per exit: ``python -m bench.whp_cost`` from the repository, with PYTHONPATH=src.

Three figures for each kind of exit. "layer": the backend's own code, its WHv functions being a C function that does
nothing (so the ctypes calls are real); this is what we add on Windows to what Hyper-V takes. "simulator": the same
exit through `testing.SimulatedWhp`, a guest executing it. "software CPU": the same guest on the software CPU itself,
whose exits never leave the library. Medians of several rounds, in microseconds.
"""

from __future__ import annotations

import ctypes
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

from microvm.bus import Bus
from microvm.hypervisor import select
from microvm.hypervisor.base import Hypervisor
from microvm.hypervisor.questions import Guest
from microvm.hypervisor.whp import WhpHypervisor, codes
from microvm.hypervisor.whp.api import PROTOTYPES
from microvm.hypervisor.whp.registers import Buffer
from microvm.testing.simulated_whp import SimulatedWhp

EXITS = 5_000
ROUNDS = 7
RIP = 0x8000
WINDOW = 0xFEC0_0000  # inside the 2 MiB that questions.Guest maps uncached around the local APIC's page

# name: the instruction, is it a port, is it a write
KINDS = {
    "out 0xe0, al": (bytes.fromhex("e6 e0"), True, True),
    "in eax, 0xe0": (bytes.fromhex("e5 e0"), True, False),
    "mov [rbx+80], ecx": (bytes.fromhex("89 4b 50"), False, True),
    "mov ecx, [rbx+80]": (bytes.fromhex("8b 4b 50"), False, False),
}


class Device:
    """Stops the vCPU after EXITS accesses."""

    def __init__(self, kick: Callable[[], None]) -> None:
        self.left = EXITS
        self._kick = kick

    def _count(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self._kick()

    def pio_read(self, offset: int, size: int) -> int:
        self._count()
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self._count()

    mmio_read = pio_read
    mmio_write = pio_write


def timed(vcpu: Any, bus: Bus, device: Device, restart: Callable[[], None]) -> float:
    """Microseconds an exit."""
    rounds = []
    for _ in range(ROUNDS):
        device.left = EXITS
        restart()
        begin = time.perf_counter()
        vcpu.run(bus)
        rounds.append((time.perf_counter() - begin) / EXITS * 1e6)
    return statistics.median(rounds)


def guest(backend: Hypervisor, code: bytes) -> float:
    """The instruction in a loop, in a guest."""
    loop = b"\xbb" + struct.pack("<I", WINDOW) + code + b"\xeb" + struct.pack("b", -2 - len(code))  # mov ebx; ...; jmp
    made = Guest(backend, loop)
    made.memory.write(0x4000 + 8 * (WINDOW >> 21 & 0x1FF), struct.pack("<Q", WINDOW & ~0x1F_FFFF | 0x9B))
    device = Device(made.vcpu.kick)
    bus = Bus()
    bus.map_pio(0xE0, 4, device)
    bus.map_mmio(WINDOW, 0x1000, device)
    try:
        return timed(made.vcpu, bus, device, made.restart)
    finally:
        made.close()


def layer(code: bytes, port: bool, write: bool) -> float:
    """The run loop alone, over functions that do nothing, with one exit context that never changes."""
    made = Guest(WhpHypervisor(SimulatedWhp().api()), code)
    vcpu = made.vcpu
    nothing = ctypes.cast(ctypes.CDLL(None).pthread_equal, ctypes.c_void_p).value  # 0 for arguments that differ
    real = (vcpu._run, vcpu._cancel, vcpu._get, vcpu._set)
    vcpu._run = PROTOTYPES["WHvRunVirtualProcessor"](nothing)
    vcpu._cancel = PROTOTYPES["WHvCancelRunVirtualProcessor"](nothing)
    vcpu._set = PROTOTYPES["WHvSetVirtualProcessorRegisters"](nothing)
    vcpu._get = PROTOTYPES["WHvGetVirtualProcessorRegisters"](nothing)
    reason = codes.WHvRunVpExitReasonX64IoPortAccess if port else codes.WHvRunVpExitReasonMemoryAccess
    head = struct.pack("<II HBBI QIHH QQ", reason, 0, 1 << 4, len(code) if port else 0, 0, 0, 0, 0, 8, 0xA09B, RIP, 2)
    info = (int(write) | (4 if code[0] == 0xE5 else 1) << 1) if port else int(write) | 8
    rest = struct.pack("<B3x16sI", 15, code.ljust(16, b"\x90"), info)
    rest += struct.pack("<H6x", 0xE0) if port else struct.pack("<QQ", WINDOW + 0x50, WINDOW + 0x50)
    raw = head + rest
    vcpu._u8[: len(raw)] = raw
    device = Device(vcpu.kick)
    bus = Bus()
    bus.map_pio(0xE0, 4, device)
    bus.map_mmio(WINDOW, 0x1000, device)
    try:
        return timed(vcpu, bus, device, lambda: None)
    finally:
        vcpu._run, vcpu._cancel, vcpu._get, vcpu._set = real
        made.close()


def calls() -> dict[str, float]:
    """Microseconds for one WHv call through the simulator, by name."""
    whp = SimulatedWhp()
    made = Guest(WhpHypervisor(whp.api()), b"\xf4")
    api, handle = made.partition.api, made.partition.handle
    one, many = Buffer(1, (codes.WHvX64RegisterRip,)), Buffer(16, range(16))
    result, gpa = ctypes.c_uint64(), ctypes.c_uint64()
    get, put = "WHvGetVirtualProcessorRegisters", "WHvSetVirtualProcessorRegisters"
    measured: dict[str, Callable[[], int]] = {
        f"{get} (1)": lambda: api.attempt(get, handle, 0, one.names_at, 1, one.values_at),
        f"{get} (16)": lambda: api.attempt(get, handle, 0, many.names_at, 16, many.values_at),
        f"{put} (1)": lambda: api.attempt(put, handle, 0, one.names_at, 1, one.values_at),
        "WHvTranslateGva": lambda: api.attempt(
            "WHvTranslateGva", handle, 0, RIP, 0, ctypes.byref(result), ctypes.byref(gpa)
        ),
    }
    found = {}
    for name, call in measured.items():
        rounds = []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            for _ in range(1000):
                call()
            rounds.append((time.perf_counter() - begin) * 1e3)
        found[name] = statistics.median(rounds)
    made.close()
    return found


def main() -> None:
    whp = SimulatedWhp()
    simulated, soft = WhpHypervisor(whp.api()), select.load("soft")
    print(f"{'us an exit':18}{'layer':>8}{'simulator':>11}{'software CPU':>14}")
    for name, (code, port, write) in KINDS.items():
        figures = layer(code, port, write), guest(simulated, code), guest(soft, code)
        print(f"{name:18}{figures[0]:8.2f}{figures[1]:11.2f}{figures[2]:14.2f}")
    print("\nus a call through the simulator")
    for name, took in calls().items():
        print(f"{name:40}{took:8.2f}")


if __name__ == "__main__":
    main()
