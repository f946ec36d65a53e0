"""What is WHP's own: the order of calls, old versions of Windows, refusals and their hints, odd exits."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator

import pytest

pytest.importorskip("iced_x86")
pytest.importorskip("unicorn")

from microvm.errors import BackendUnavailable, HostError, SnapshotError, StateError
from microvm.hypervisor import select
from microvm.hypervisor.base import PartitionConfig, StopReason
from microvm.hypervisor.whp import WhpHypervisor, codes
from microvm.hypervisor.whp.api import PROTOTYPES, Api
from microvm.hypervisor.whp.failures import ENABLE_COMMANDS
from microvm.hypervisor.whp.registers import Buffer
from microvm.testing.simulated_whp import PROFILES, SimulatedWhp

from .asm import Code
from .machine import DATA, MMIO, Machine

SETUP, CREATE, VP, MAP, RUN, SET = (
    "WHvSetupPartition",
    "WHvCreatePartition",
    "WHvCreateVirtualProcessor",
    "WHvMapGpaRange",
    "WHvRunVirtualProcessor",
    "WHvSetVirtualProcessorRegisters",
)


@pytest.fixture
def whp() -> Iterator[SimulatedWhp]:
    made = SimulatedWhp()
    yield made
    assert made.error is None


def bench(whp: SimulatedWhp, **options: object) -> Machine:
    return Machine(WhpHypervisor(whp.api()), **options)  # type: ignore[arg-type]


def simple(machine: Machine) -> int:
    return machine.finish(machine.long(Code().mov("al", 7).stop()))


@pytest.mark.parametrize("profile", PROFILES)
def test_calls_come_in_the_order_that_all_clients_share(profile: str) -> None:
    whp = SimulatedWhp(profile)
    with bench(whp, vcpus=2) as machine:
        assert simple(machine) == 7
    names = whp.names()
    assert whp.calls[0].detail == codes.WHvCapabilityCodeHypervisorPresent
    first = {name: names.index(name) for name in dict.fromkeys(names)}
    assert first["WHvGetCapability"] < first[CREATE] < first["WHvSetPartitionProperty"] < first[SETUP]
    assert first[SETUP] < first[MAP]
    assert first[SETUP] < first[VP] < first[SET] < first[RUN]
    last_property = len(names) - 1 - names[::-1].index("WHvSetPartitionProperty")
    assert last_property < first[SETUP], "properties are fixed by the set-up"
    assert names[-1] == "WHvDeletePartition"
    assert names.count("WHvDeleteVirtualProcessor") == 2
    properties = [call.detail for call in whp.calls if call.name == "WHvSetPartitionProperty"]
    assert properties[:2] == [
        codes.WHvPartitionPropertyCodeProcessorCount,
        codes.WHvPartitionPropertyCodeLocalApicEmulationMode,
    ]
    assert {
        codes.WHvPartitionPropertyCodeExtendedVmExits,
        codes.WHvPartitionPropertyCodeX64MsrExitBitmap,
        codes.WHvPartitionPropertyCodeProcessorFeaturesBanks,
        codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks,
        codes.WHvPartitionPropertyCodeCpuidResultList,
    } <= set(properties)


def test_windows_10_gets_what_it_knows_and_no_more() -> None:
    whp = SimulatedWhp("win10-19045")
    with bench(whp) as machine:
        assert simple(machine) == 7
        assert machine.partition.refused == ("SyntheticProcessorFeaturesBanks",)  # type: ignore[attr-defined]
    wanted = ("WHvSetPartitionProperty", codes.WHvPartitionPropertyCodeProcessorFeaturesBanks)
    banks = [call.result for call in whp.calls if (call.name, call.detail) == wanted]
    assert banks == [codes.E_INVALIDARG, codes.S_OK], "once with the invariant TSC, then without"


def test_partition_boots_where_windows_refuses_everything_optional(whp: SimulatedWhp) -> None:
    optional = frozenset(
        (
            codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks,
            codes.WHvPartitionPropertyCodeProcessorFeaturesBanks,
            codes.WHvPartitionPropertyCodeExtendedVmExits,
            codes.WHvPartitionPropertyCodeCpuidResultList,
        )
    )
    missing = frozenset(("WHvSuspendPartitionTime", "WHvResumePartitionTime", "WHvQueryGpaRangeDirtyBitmap"))
    oldest = dataclasses.replace(PROFILES["win10-19045"], unknown_properties=optional, missing=missing)
    with bench(SimulatedWhp(oldest)) as machine:
        assert simple(machine) == 7
        assert len(machine.partition.refused) == 4  # type: ignore[attr-defined]
        assert not machine.partition.caps.dirty_log
        machine.partition.pause_time()  # without the calls, by the TSC
        before = machine.vcpu.get_msr(0x10)
        machine.partition.resume_time()
        assert machine.vcpu.get_msr(0x10) - before < 50_000_000


@pytest.mark.parametrize(
    ("call", "result", "hint"),
    [
        ("WHvGetCapability", codes.ERROR_HV_NOT_PRESENT, ENABLE_COMMANDS[0]),
        (CREATE, codes.ERROR_HV_NOT_PRESENT, ENABLE_COMMANDS[1]),
        (CREATE, codes.E_ACCESSDENIED, "elevated"),
        (SETUP, codes.ERROR_HV_ACCESS_DENIED, "elevated"),
        (SETUP, codes.WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG, ENABLE_COMMANDS[0]),
    ],
)
def test_unusable_platform_says_what_to_enable(whp: SimulatedWhp, call: str, result: int, hint: str) -> None:
    whp.fail(call, result)
    with pytest.raises(BackendUnavailable) as caught:
        WhpHypervisor(whp.api()).create_partition(PartitionConfig())
    assert caught.value.call == call
    assert caught.value.code == result
    assert hint in caught.value.hint
    assert f"{result:#010x}" in str(caught.value)
    assert not whp.partitions, "nothing is left behind"


def test_feature_switched_off_names_both_commands() -> None:
    backend = WhpHypervisor(SimulatedWhp(present=False).api())
    found = backend.probe()
    assert not found.usable
    assert all(command in found.hint for command in ENABLE_COMMANDS)
    assert "restart" in found.hint


@pytest.mark.parametrize(
    "call", ["WHvSetPartitionProperty", SETUP, MAP, VP, SET, RUN, "WHvGetVirtualProcessorRegisters"]
)
@pytest.mark.parametrize("result", [codes.ERROR_HV_INSUFFICIENT_MEMORY, codes.E_OUTOFMEMORY])
def test_failure_of_any_call_is_a_host_error_that_names_it(whp: SimulatedWhp, call: str, result: int) -> None:
    whp.fail(call, result)
    with pytest.raises(HostError) as caught, bench(whp) as machine:
        simple(machine)
    assert (caught.value.call, caught.value.code) == (call, result)
    assert not isinstance(caught.value, BackendUnavailable)
    assert "memory" in caught.value.hint
    assert not whp.partitions


@pytest.mark.parametrize("name", ["WHvCreatePartition", "WHvRunVirtualProcessor"])
def test_library_without_a_first_function_is_unavailable(whp: SimulatedWhp, name: str) -> None:
    with pytest.raises(BackendUnavailable, match=name):
        Api(lambda asked: None if asked == name else whp.resolve(asked))


def test_windows_without_interrupts_is_too_old(whp: SimulatedWhp) -> None:
    api = Api(lambda asked: None if asked == "WHvRequestInterrupt" else whp.resolve(asked))
    with pytest.raises(BackendUnavailable, match="1809"):
        WhpHypervisor(api).create_partition(PartitionConfig())


def test_auto_passes_over_an_unusable_whp_and_by_name_it_fails() -> None:
    with SimulatedWhp(present=False).installed():
        assert select.automatic().name != "whp"
        with pytest.raises(BackendUnavailable):
            select.choose("whp").create_partition(PartitionConfig())


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_exits_that_bring_too_few_bytes_are_completed(count: int) -> None:
    profile = dataclasses.replace(PROFILES["win11"], instruction_bytes=count)
    with bench(SimulatedWhp(profile)) as machine:
        machine.window.answer = lambda offset, size: 0x1234
        code = Code().mov("rbx", MMIO).raw("c7 83 88 00 00 00 78 56 34 12")  # mov dword [rbx + 0x88], 0x12345678
        machine.finish(machine.long(code.raw("8b 8b 10 01 00 00").move("eax", "ecx").stop(4)))
        assert machine.window.writes == [(0x88, 4, 0x1234_5678)]
        assert machine.stops == [0x1234]


def test_instruction_across_a_page_boundary_is_fetched_whole() -> None:
    profile = dataclasses.replace(PROFILES["win11"], instruction_bytes=3)
    with bench(SimulatedWhp(profile)) as machine:
        origin = 0x9000 - 13  # mov rbx is 10 bytes: the store begins 3 bytes before the page ends
        code = Code(origin=origin).mov("rbx", MMIO).raw("c7 83 88 00 00 00 78 56 34 12").mov("al", 1)
        machine.finish(machine.long(code.stop()))
        assert machine.window.writes == [(0x88, 4, 0x1234_5678)]


def test_unsupported_instruction_on_a_device_is_a_clear_stop(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        stop = machine.go(machine.long(Code().mov("rbx", MMIO).raw("ff 23")))  # jmp [rbx]
        assert stop.reason == StopReason.CRASHED
        assert "jmp" in stop.detail
        assert "device memory" in stop.detail
        assert stop.registers is not None


def test_page_fault_of_the_other_operand_reaches_the_guest(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        code = Code().mov("rsi", MMIO).mov("rdi", 1 << 30).raw("a4").mov("al", 1).stop()  # movsb
        registers = machine.long(code)
        machine.handler(14, Code(origin=0x9000).raw("5b 0f 20 d0").stop(4))  # pop rbx; mov rax, cr2
        assert machine.finish(registers) == 1 << 30
        assert machine.vcpu.get_registers().rbx == 2, "a write to a page that is not there"


def test_memory_written_for_the_guest_is_dirty(whp: SimulatedWhp) -> None:
    with bench(whp, track_dirty=True) as machine:
        code = Code().mov("rsi", MMIO).mov("rdi", DATA + 0x5000).mov("ecx", 4).raw("f3 a4").stop()
        registers = machine.long(code)
        machine.partition.dirty(0, machine.memory.size)
        machine.finish(registers)
        bitmap = machine.partition.dirty(0, machine.memory.size)
        page = (DATA + 0x5000) // 4096
        assert bitmap[page // 8] >> page % 8 & 1


def test_halt_exit_with_interrupts_on_is_entered_again(whp: SimulatedWhp) -> None:
    """Some versions return from HLT although the local APIC is in the hypervisor."""
    with bench(whp) as machine:
        simple(machine)
        vcpu, runs = machine.vcpu, []
        real = vcpu._run  # type: ignore[attr-defined]

        def run(handle: int, index: int, context: int, size: int) -> int:
            runs.append(1)
            if len(runs) > 3:
                result: int = real(handle, index, context, size)
                return result
            exit_context = (ctypes.c_uint64 * 28).from_address(context)
            exit_context[0], exit_context[5] = codes.WHvRunVpExitReasonX64Halt, 0x202
            return 0

        vcpu._run = run  # type: ignore[attr-defined]
        assert simple(machine) == 7
        assert len(runs) > 3


def test_spurious_cancel_is_not_a_kick(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        functions = whp.api().functions
        functions["WHvCancelRunVirtualProcessor"](machine.partition.handle, 0, 0)  # type: ignore[attr-defined]
        assert simple(machine) == 7


def test_harmless_msrs_read_as_zero_and_others_are_refused(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        registers = machine.long(Code().rdmsr(0x9999).mov("al", 1).stop())
        machine.handler(13, Code(origin=0x9000).mov("al", 13).stop())
        assert machine.finish(registers) == 13
        assert machine.vcpu.exits[codes.WHvRunVpExitReasonX64MsrAccess] == 1  # type: ignore[attr-defined]


def test_interrupt_nobody_can_take_is_counted(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        machine.partition.signal_msi(0xFEE0_0000, 5)
        machine.partition.signal_msi(0xFEE0_0000, 2 << 8)  # SMI
        assert whp.counts["WHvRequestInterrupt"] == 0
        whp.fail("WHvRequestInterrupt", codes.ERROR_HV_INVALID_PARAMETER)
        machine.partition.signal_msi(0xFEE0_0000, 0x41)
        assert machine.partition.dropped_interrupts == 3  # type: ignore[attr-defined]


def test_closed_partition_is_a_state_error(whp: SimulatedWhp) -> None:
    machine = bench(whp)
    machine.close()
    with pytest.raises(StateError):
        machine.vcpu.get_registers()
    machine.vcpu.kick()
    machine.partition.signal_msi(0xFEE0_0000, 0x41)


def test_tsc_deadline_is_restored_last(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        simple(machine)
        blob = machine.vcpu.save()
        start = len(whp.calls)
        machine.vcpu.restore(blob)
        names = [name for name in whp.names()[start:] if name.startswith("WHvSet")]
        assert names == [
            SET,
            "WHvSetVirtualProcessorXsaveState",
            "WHvSetVirtualProcessorInterruptControllerState2",
            SET,
        ]


def test_state_of_a_newer_windows_is_refused_on_an_older_one(whp: SimulatedWhp) -> None:
    with bench(whp) as newer, bench(SimulatedWhp("win10-19045")) as older:
        with pytest.raises(SnapshotError, match="does not have"):
            older.vcpu.restore(newer.vcpu.save())
        newer.vcpu.restore(older.vcpu.save())


# The simulator is strict


def raw(whp: SimulatedWhp) -> tuple[Api, int]:
    api = whp.api()
    handle = ctypes.c_void_p()
    api.call(CREATE, ctypes.byref(handle))
    return api, handle.value or 0


def test_calls_out_of_order_are_refused(whp: SimulatedWhp) -> None:
    api, handle = raw(whp)
    assert api.attempt(VP, handle, 0, 0) == codes.ERROR_HV_INVALID_PARTITION_STATE
    assert api.attempt(MAP, handle, 0x1000, 0, 0x1000, 7) == codes.ERROR_HV_INVALID_PARTITION_STATE
    assert api.attempt(SETUP, handle) == codes.WHV_E_INVALID_PARTITION_CONFIG
    count = ctypes.c_uint32(1)
    code = codes.WHvPartitionPropertyCodeProcessorCount
    assert api.attempt("WHvSetPartitionProperty", handle, code, ctypes.byref(count), 4) == 0
    mode = codes.WHvPartitionPropertyCodeLocalApicEmulationMode
    assert api.attempt("WHvSetPartitionProperty", handle, mode, ctypes.byref(count), 4) == 0
    assert api.attempt(SETUP, handle) == 0
    late = api.attempt("WHvSetPartitionProperty", handle, code, ctypes.byref(count), 4)
    assert late == codes.ERROR_HV_INVALID_PARTITION_STATE
    assert api.attempt(RUN, handle, 0, 0, 224) == codes.WHV_E_VP_DOES_NOT_EXIST
    assert api.attempt(VP, handle, 0, 0) == 0
    assert api.attempt(VP, handle, 0, 0) == codes.WHV_E_VP_ALREADY_EXISTS
    assert api.attempt("WHvDeletePartition", handle) == 0
    assert api.attempt("WHvDeletePartition", handle) == codes.E_INVALIDARG


def test_misaligned_registers_and_wrong_sizes_are_refused(whp: SimulatedWhp) -> None:
    with bench(whp) as machine:
        api, handle = machine.partition.api, machine.partition.handle  # type: ignore[attr-defined]
        buffer = Buffer(2, (codes.WHvX64RegisterRax,))
        get = "WHvGetVirtualProcessorRegisters"
        assert api.attempt(get, handle, 0, buffer.names_at, 1, buffer.values_at + 8) == codes.E_INVALIDARG
        assert api.attempt(get, handle, 0, buffer.names_at, 1, buffer.values_at) == 0
        assert api.attempt(RUN, handle, 0, buffer.values_at, 100) == codes.E_INVALIDARG
        buffer.names[0] = 0x7777
        unknown = api.attempt(get, handle, 0, buffer.names_at, 1, buffer.values_at)
        assert unknown == codes.WHV_E_INVALID_VP_REGISTER_NAME
        short = ctypes.c_uint8()
        size = ctypes.c_uint32()
        code = codes.WHvCapabilityCodeProcessorFeaturesBanks
        result = api.attempt("WHvGetCapability", code, ctypes.byref(short), 1, ctypes.byref(size))
        assert (result, size.value) == (codes.WHV_E_INSUFFICIENT_BUFFER, 24)


def test_every_function_is_reached_through_the_prototype_of_the_real_one(whp: SimulatedWhp) -> None:
    api = whp.api()
    assert set(api.functions) <= set(PROTOTYPES)
    assert all(isinstance(function, PROTOTYPES[name]) for name, function in api.functions.items())


def test_instruction_we_carry_out_ends_the_interrupt_shadow(whp: SimulatedWhp) -> None:
    """STI; OUT: the interrupt that the OUT brings comes before the next instruction, not one later."""
    with bench(whp) as machine:
        code = Code().apic(0xF0, 0x1FF).mov("ecx", 0).mov("dx", 0x300).sti().raw("ee").inc("ecx").inc("ecx").stop()
        registers = machine.long(code)
        machine.handler(0x41, Code(origin=0x9000).raw("89 c8 89 c6").eoi().raw("89 f0").stop())  # eax = esi = ecx
        machine.log.on_write = lambda offset, size, value: machine.partition.signal_msi(0xFEE0_0000, 0x41)
        assert machine.finish(registers) == 0
