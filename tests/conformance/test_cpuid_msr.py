"""What the guest is told about its processor, and model-specific registers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .asm import Code
from .conftest import gap
from .machine import PORT_LOG, Machine

HANDLER = 0x9000


def cpuid(machine: Machine, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX as the guest sees them."""
    machine.finish(machine.long(Code().cpuid(leaf, subleaf).stop()))
    registers = machine.vcpu.get_registers()
    # The stop used dx, so edx goes by way of another register.
    code = Code().cpuid(leaf, subleaf).move("esi", "edx").stop()
    machine.finish(machine.long(code))
    registers = machine.vcpu.get_registers()
    low = 0xFFFF_FFFF
    return registers.rax & low, registers.rbx & low, registers.rcx & low, registers.rsi & low


def ours(machine: Machine) -> None:
    """Skip where the host shows the guest its own CPUID whatever we say."""
    if cpuid(machine, 0x4000_0000)[1:] != signature(machine):
        gap(machine.backend, "the host ignores the CPUID leaves it is given")


def signature(machine: Machine) -> tuple[int, int, int]:
    text = b"Microsoft Hv" if machine.backend.name == "whp" else b"KVMKVMKVM\0\0\0"
    return tuple(int.from_bytes(text[i : i + 4], "little") for i in (0, 4, 8))  # type: ignore[return-value]


def test_guest_is_told_of_the_hypervisor_and_its_clock(machine: Machine) -> None:
    ours(machine)
    assert cpuid(machine, 1)[2] >> 31 == 1
    eax, *words = cpuid(machine, 0x4000_0000)
    assert tuple(words) == signature(machine)
    if machine.backend.name == "whp":
        privileges, _, _, misc = cpuid(machine, 0x4000_0003)
        assert privileges >> 1 & 1, "the partition's reference counter"
        assert privileges >> 9 & 1, "the reference TSC page"
        assert misc >> 8 & 1, "the frequency MSRs"
        return
    assert eax in (0, 0x4000_0001)
    features = cpuid(machine, 0x4000_0001)[0]
    assert features >> 3 & 1, "kvmclock by the new MSRs"
    assert features >> 24 & 1, "stable clock"


def test_guest_is_told_the_rate_of_the_tsc(machine: Machine) -> None:
    ours(machine)
    assert cpuid(machine, 0)[0] >= 0x16
    denominator, numerator, crystal_hz, _ = cpuid(machine, 0x15)
    assert denominator
    assert crystal_hz // 1000 * numerator < 1 << 32, "Linux multiplies in 32 bits"
    hz = crystal_hz * numerator / denominator
    assert 100e6 < hz < 10e9
    assert abs(cpuid(machine, 0x16)[0] - hz / 1e6) <= 2


def test_what_cannot_be_saved_is_hidden(machine: Machine) -> None:
    ours(machine)
    _, _, ecx, _ = cpuid(machine, 1)
    assert not ecx >> 3 & 1, "MONITOR"
    assert not ecx >> 5 & 1, "VMX"
    assert not cpuid(machine, 0x8000_0001)[2] >> 2 & 1, "SVM"
    assert cpuid(machine, 0xA)[0] & 0xFF == 0, "performance counters"
    _, ebx, ecx, edx = cpuid(machine, 7)
    assert not ebx >> 25 & 1, "processor trace"
    assert not ebx >> 2 & 1, "SGX"
    assert not ecx >> 7 & 1, "shadow stacks"
    assert not edx >> 20 & 1, "indirect branch tracking"


def test_timers_are_the_ones_that_need_no_calibration(machine: Machine) -> None:
    ours(machine)
    assert cpuid(machine, 1)[2] >> 24 & 1, "TSC deadline"
    assert cpuid(machine, 6)[0] >> 2 & 1, "the APIC timer always runs"
    assert cpuid(machine, 0x8000_0007)[3] >> 8 & 1, "invariant TSC"


def test_each_vcpu_is_a_core_of_one_package(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=3)
    ours(machine)
    assert cpuid(machine, 1)[1] >> 24 == 0
    if cpuid(machine, 0)[0] >= 0xB:
        assert cpuid(machine, 0xB, 1)[1] in (0, 3)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xC000_0081, 0x0013_0008_0000_0000),  # STAR
        (0xC000_0082, 0xFFFF_8000_1234_5678),  # LSTAR
        (0xC000_0084, 0x4_7700),  # SFMASK
        (0xC000_0100, 0xFFFF_8000_0000_1000),  # FS base
        (0xC000_0101, 0x7FFF_0000_2000),  # GS base
        (0xC000_0102, 0xFFFF_8888_0000_3000),  # kernel GS base
        (0xC000_0103, 0x5A),  # TSC_AUX
        (0x174, 0x10),  # SYSENTER_CS
        (0x175, 0x8000_4000),  # SYSENTER_ESP: 32 bits on AMD
        (0x176, 0x8000_5000),  # SYSENTER_EIP
        (0x277, 0x0007_0406_0007_0406),  # PAT
    ],
)
def test_msr_written_by_the_host_is_read_by_the_guest_and_back(machine: Machine, index: int, value: int) -> None:
    code = Code().rdmsr(index).out(PORT_LOG, 4).rdmsr(index).raw("89 d0").out(PORT_LOG, 4)  # mov eax, edx
    code.wrmsr(index, value & ~0xF if index != 0xC000_0084 else value).mov("al", 1).stop()
    registers = machine.long(code)
    machine.vcpu.set_registers(registers)
    try:
        machine.vcpu.set_msr(index, value)
    except KeyError:
        gap(machine.backend, f"the host does not let MSR {index:#x} be written")
    assert machine.vcpu.get_msr(index) == value
    machine.handler(13, Code(origin=HANDLER).mov("al", 13).stop())
    if machine.finish() == 13:
        gap(machine.backend, f"the host does not let the guest access MSR {index:#x}")
    low, high = machine.log.values
    assert high << 32 | low == value
    assert machine.vcpu.get_msr(index) == (value & ~0xF if index != 0xC000_0084 else value)


def test_unknown_msr_is_a_key_error_to_the_host(machine: Machine) -> None:
    with pytest.raises(KeyError):
        machine.vcpu.get_msr(0x1234_5678)
    with pytest.raises(KeyError):
        machine.vcpu.set_msr(0x1234_5678, 1)


@pytest.mark.parametrize("instruction", ["0f 32", "0f 30"])
def test_unknown_msr_is_a_general_protection_fault_to_the_guest(machine: Machine, instruction: str) -> None:
    registers = machine.long(Code().mov("ecx", 0x1234_5678).raw(instruction).mov("al", 1).stop())
    machine.handler(13, Code(origin=HANDLER).mov("al", 13).stop())
    assert machine.finish(registers) == 13


def test_tsc_counts_at_the_rate_cpuid_tells(machine: Machine) -> None:
    ours(machine)
    import time

    denominator, numerator, crystal_hz, _ = cpuid(machine, 0x15)
    readings: list[tuple[float, int]] = []
    machine.log.on_write = lambda offset, size, value: readings.append((time.perf_counter(), value))
    code = Code().raw("0f 31").out(PORT_LOG, 4)  # rdtsc
    code.in_(PORT_LOG)
    code.raw("0f 31").out(PORT_LOG, 4).stop()

    def wait(offset: int, size: int) -> int:
        time.sleep(0.1)
        return 0

    machine.log.answer = wait
    machine.finish(machine.long(code))
    (t0, first), (t1, second) = readings
    rate = ((second - first) % (1 << 32)) / (t1 - t0)
    hz = crystal_hz * numerator / denominator
    assert rate == pytest.approx(hz, rel=0.05)
