"""HLT and waking up, message-signalled interrupts, the local APIC's timers, several vCPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from microvm.hypervisor.base import StopReason

from .asm import LAPIC, Code
from .machine import CODE, PORT_LOG, Machine, skip_if_not_emulated

HANDLER = 0x9000
VECTOR = 0x41
MSI = LAPIC  # to APIC 0, physical
LEVEL = 1 << 15 | 1 << 14
LATE = "interrupts come late: the host interprets supervisor instructions without looking for them"
SVR, LVT_TIMER, INITIAL_COUNT, DIVIDE, ICR_LOW, ICR_HIGH = 0xF0, 0x320, 0x380, 0x3E0, 0x300, 0x310


def enabled(origin: int = CODE) -> Code:
    """The local APIC switched on."""
    return Code(origin=origin).apic(SVR, 0x1FF)


def handler(value: int, origin: int = HANDLER) -> Code:
    """Log ``value``, end the interrupt, return. Keeps rax and rdx."""
    code = Code(origin=origin).raw("50 52")  # push rax; push rdx
    return code.mov("al", value).out(PORT_LOG + 1).eoi().raw("5a 58").iretq()  # pop rdx; pop rax


def later(action: Callable[[], None], seconds: float = 0.05) -> Callable[[int, int, int], None]:
    """For `Log.on_write`: when the guest writes PORT_LOG, do it a moment later on another thread."""

    def on_write(offset: int, size: int, value: int) -> None:
        if offset == 0:
            threading.Timer(seconds, action).start()

    return on_write


def test_hlt_waits_for_an_interrupt_without_using_the_processor(machine: Machine) -> None:
    code = enabled().sti().out(PORT_LOG).hlt().mov("al", 5).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    machine.log.on_write = later(lambda: machine.partition.signal_msi(MSI, VECTOR), 0.5)
    started, used = time.perf_counter(), time.process_time()
    assert machine.finish(registers) == 5
    assert time.perf_counter() - started > 0.45
    assert time.process_time() - used < 0.2
    assert machine.log.writes[-1] == (1, 1, 0x77)


def test_hlt_with_interrupts_off_is_halted(machine: Machine) -> None:
    stop = machine.go(machine.long(Code().cli().hlt()))
    assert stop.reason == StopReason.HALTED
    assert machine.vcpu.get_registers().rip == CODE + 2
    assert machine.go().reason == StopReason.HALTED


def test_a_halted_vcpu_goes_on_from_new_registers(machine: Machine) -> None:
    machine.go(machine.long(Code().cli().hlt()))
    assert machine.finish(machine.long(Code().mov("al", 3).stop())) == 3


def test_nmi_wakes_a_vcpu_that_has_interrupts_off(machine: Machine) -> None:
    code = enabled().cli().out(PORT_LOG).hlt().mov("al", 5).stop()
    registers = machine.long(code)
    machine.handler(2, Code(origin=HANDLER).raw("50 52").mov("al", 2).out(PORT_LOG + 1).raw("5a 58").iretq())
    machine.log.on_write = later(lambda: machine.partition.signal_msi(MSI, 4 << 8))
    stop = machine.go(registers)
    deadline = time.monotonic() + 5
    while stop.reason == StopReason.HALTED and time.monotonic() < deadline:  # until the NMI is there
        time.sleep(0.01)
        stop = machine.go()
    assert stop.reason == StopReason.KICKED
    assert machine.log.values[-1] == 2
    assert machine.stops == [5]


def test_interrupt_sent_while_not_running_is_delivered_on_the_next_run(machine: Machine) -> None:
    code = enabled().mov("al", 1).stop().sti().nop().mov("al", 2).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    assert machine.finish(registers) == 1
    machine.partition.signal_msi(MSI, VECTOR)
    assert machine.resume() == 2
    machine.unless(machine.log.values == [0x77], LATE)


def test_sti_delays_interrupts_by_one_instruction(machine: Machine) -> None:
    code = enabled().mov("ecx", 0).out(PORT_LOG).sti().inc("ecx").inc("ecx").inc("ecx").stop()
    registers = machine.long(code)
    # mov eax, ecx; out
    machine.handler(VECTOR, Code(origin=HANDLER).raw("89 c8").out(PORT_LOG + 1).eoi().iretq())
    machine.log.on_write = lambda offset, size, value: machine.partition.signal_msi(MSI, VECTOR) if not offset else None
    machine.finish(registers)
    machine.unless(len(machine.log.values) == 2, LATE)
    assert machine.log.values[-1] == 1


def test_sti_and_hlt_lose_no_wake_up(machine: Machine) -> None:
    """An interrupt that is pending before STI must still end the HLT behind it."""
    code = enabled().out(PORT_LOG).sti().hlt().mov("al", 6).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    machine.log.on_write = lambda offset, size, value: machine.partition.signal_msi(MSI, VECTOR) if not offset else None
    assert machine.finish(registers) == 6


def test_higher_vector_comes_first(machine: Machine) -> None:
    code = enabled().out(PORT_LOG).sti().nop().nop().cli().stop()
    registers = machine.long(code)
    machine.handler(0x41, handler(0x41))
    machine.handler(0x91, handler(0x91, HANDLER + 0x100))

    def both(offset: int, size: int, value: int) -> None:
        if offset == 0:
            machine.partition.signal_msi(MSI, 0x41)
            machine.partition.signal_msi(MSI, 0x91)

    machine.log.on_write = both
    machine.finish(registers)
    machine.unless(len(machine.log.values) == 3, LATE)
    assert machine.log.values[1:] == [0x91, 0x41]


def test_task_priority_holds_lower_vectors_back(machine: Machine) -> None:
    code = enabled().mov("rax", 8).raw("44 0f 22 c0")  # mov cr8, rax
    code.out(PORT_LOG).sti().nop().nop().mov("al", 1).out(PORT_LOG + 2)
    code.mov("rax", 0).raw("44 0f 22 c0").nop().nop().mov("al", 2).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    machine.log.on_write = lambda offset, size, value: machine.partition.signal_msi(MSI, VECTOR) if not offset else None
    assert machine.finish(registers) == 2
    machine.unless(0x77 in machine.log.values, LATE)
    assert machine.log.values[1:] == [1, 0x77]


def test_a_message_to_nobody_and_a_bad_vector_are_dropped(machine: Machine) -> None:
    registers = machine.long(enabled().sti().out(PORT_LOG).nop().nop().mov("al", 1).stop())
    machine.vcpu.set_registers(registers)
    machine.partition.signal_msi(MSI | 0x55 << 12, VECTOR)
    machine.partition.signal_msi(MSI, 3)
    assert machine.finish() == 1


def test_end_of_a_level_interrupt_reaches_the_bus(machine: Machine) -> None:
    ended: list[int] = []
    machine.bus.on_eoi(ended.append)
    code = enabled().sti().out(PORT_LOG).label("wait").in_(PORT_LOG + 3).raw("84 c0").j("z", "wait")
    registers = machine.long(code.mov("al", 1).stop())
    machine.handler(0x51, handler(0x51))
    machine.handler(0x61, handler(0x61, HANDLER + 0x100))

    def on_write(offset: int, size: int, value: int) -> None:
        if offset == 0:
            machine.partition.signal_msi(MSI, 0x51 | LEVEL)
            machine.partition.signal_msi(MSI, 0x61)  # edge: nobody need hear of its end

    machine.log.on_write = on_write
    machine.log.answer = lambda offset, size: int(len(machine.log.values) == 3)
    machine.finish(registers)
    assert ended == [0x51]


def test_an_event_delivers_its_message(machine: Machine) -> None:
    if not machine.partition.caps.irqfd:
        assert machine.partition.route_irq(5, MSI, VECTOR) is None
        return
    registers = machine.long(enabled().sti().out(PORT_LOG).hlt().out(PORT_LOG).hlt().mov("al", 8).stop())
    machine.handler(VECTOR, handler(0x77))
    machine.handler(VECTOR + 1, handler(0x78, HANDLER + 0x100))
    event = machine.partition.route_irq(5, MSI, VECTOR)
    assert event is not None
    fired = 0

    def fire() -> None:
        nonlocal fired
        fired += 1
        if fired == 2:
            assert machine.partition.route_irq(5, MSI, VECTOR + 1) is event
        event.set()

    machine.log.on_write = later(fire)
    assert machine.finish(registers) == 8
    assert [value for value in machine.log.values if value in (0x77, 0x78)] == [0x77, 0x78]


def timer_test(machine: Machine, arm: Code, count: int, at_least_s: float) -> None:
    """Arm a timer, sleep ``count`` times, stop."""
    arm.sti()
    for _ in range(count):
        arm.hlt()
    registers = machine.long(arm.mov("al", 4).stop())
    machine.handler(VECTOR, handler(0x77))
    started = time.perf_counter()
    assert machine.finish(registers) == 4
    elapsed = time.perf_counter() - started
    assert machine.log.values[:count] == [0x77] * count  # a busy host may let a periodic timer come once more
    assert count > 1 or len(machine.log.values) == 1
    assert elapsed >= at_least_s
    assert elapsed < at_least_s + 2


def test_one_shot_timer_fires_once(machine: Machine) -> None:
    code = enabled().apic(DIVIDE, 0xB).apic(LVT_TIMER, VECTOR).apic(INITIAL_COUNT, 10_000_000)
    timer_test(machine, code, 1, 0.002)


def test_periodic_timer_fires_again_and_again(machine: Machine) -> None:
    code = enabled().apic(DIVIDE, 0xB).apic(LVT_TIMER, VECTOR | 1 << 17).apic(INITIAL_COUNT, 5_000_000)
    timer_test(machine, code, 4, 0.004)


def test_deadline_timer_fires_when_the_tsc_gets_there(machine: Machine) -> None:
    code = enabled().apic(LVT_TIMER, VECTOR | 2 << 17)
    code.raw("0f 31")  # rdtsc
    code.raw("48 c1 e2 20 48 09 d0")  # shl rdx, 32; or rax, rdx
    code.raw("48 05").raw((50_000_000).to_bytes(4, "little"))  # add rax, 50,000,000 cycles
    code.raw("48 89 c2 48 c1 ea 20").mov("ecx", 0x6E0).raw("0f 30")  # mov rdx, rax; shr rdx, 32; wrmsr
    timer_test(machine, code, 1, 0.005)


def start_ap(code: Code, page: int) -> Code:
    """Wake APIC 1 at real-mode address page * 4096: INIT, then SIPI. [SDM] 3A 9.4"""
    code.apic(ICR_HIGH, 1 << 24).apic(ICR_LOW, 0x4500)
    return code.apic(ICR_HIGH, 1 << 24).apic(ICR_LOW, 0x4600 | page)


def test_second_vcpu_starts_where_the_sipi_says(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    # The first polls until the second has spoken: in al, dx; test al, al; jz
    code = start_ap(enabled(), 0xC).label("wait").in_(PORT_LOG + 3).raw("84 c0").j("z", "wait").mov("al", 1).stop()
    second = Code(16, 0xC000).mov("al", 0x22).out(PORT_LOG + 2)
    second.raw("8c c8").out(PORT_LOG + 4, 2).label("end").cli().hlt().jmp("end")  # mov ax, cs
    machine.memory.write(0xC000, second.build())
    machine.log.answer = lambda offset, size: int(len(machine.log.writes) >= 2)
    registers = machine.long(code)
    ap = machine.spawn(1)
    assert machine.finish(registers) == 1
    ap.join(kick=True)
    assert machine.log.writes == [(2, 1, 0x22), (4, 2, 0xC00)]


def test_a_sipi_sent_before_the_second_vcpu_runs_is_not_lost(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    second = Code(16, 0xC000).mov("al", 0x22).out(PORT_LOG + 2).label("end").cli().hlt().jmp("end")
    machine.memory.write(0xC000, second.build())
    machine.finish(machine.long(start_ap(enabled(), 0xC).mov("al", 1).stop()))
    ap = machine.spawn(1)
    deadline = time.monotonic() + 5
    while not machine.log.writes and time.monotonic() < deadline:
        time.sleep(0.01)
    ap.join(kick=True)
    assert machine.log.writes == [(2, 1, 0x22)]


def test_waiting_for_a_sipi_ends_with_a_kick(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    ap = machine.spawn(1)
    time.sleep(0.05)
    assert ap.join(kick=True).reason == StopReason.KICKED


def test_locked_increments_of_two_vcpus_are_all_there(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    turns = 20_000 if machine.backend.name != "kvm" else 3_000
    first = start_ap(enabled(), 0xC).mov("rbx", 0x4FF0).mov("ecx", turns)
    # lock inc dword [rbx]; dec ecx; jnz
    first.label("loop").raw("f0 ff 03").dec("ecx").j("nz", "loop")
    first.mov("rbx", 0x4FF4).label("wait").raw("83 3b 00").j("z", "wait").mov("al", 1).stop()  # cmp dword [rbx], 0
    # lock inc dword [0x4ff0]; dec ecx; jnz; mov byte [0x4ff4], 1
    second = Code(16, 0xC000).raw("31 c0 8e d8").mov("ecx", turns)
    second.label("loop").raw("f0 66 ff 06 f0 4f").dec("ecx").j("nz", "loop").raw("c6 06 f4 4f 01")
    second.label("end").cli().hlt().jmp("end")
    registers = machine.long(first)
    machine.memory.write(0xC000, second.build())
    machine.memory.write(0x4FF0, bytes(8))
    ap = machine.spawn(1)
    stop = machine.go(registers)
    skip_if_not_emulated(machine.backend, stop)
    ap.join(kick=True)
    assert machine.stops == [1]
    assert machine.memory.load_u32(0x4FF0) == 2 * turns


def test_interrupt_from_one_vcpu_to_another(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    code = start_ap(enabled(), 0xC)
    # Wait until the second says that it sleeps, then send it an NMI, whose real-mode vector 2 speaks.
    code.label("up").in_(PORT_LOG + 3).raw("84 c0").j("z", "up").apic(ICR_HIGH, 1 << 24).apic(ICR_LOW, 0x4400)
    code.label("wait").in_(PORT_LOG + 4).raw("84 c0").j("z", "wait").mov("al", 1).stop()
    second = Code(16, 0xC000).raw("31 c0 8e d8 8e d0 bc 00 70")  # ds = ss = 0, sp = 0x7000
    second.mov("al", 1).out(PORT_LOG + 2).label("end").cli().hlt().jmp("end")
    on_nmi = Code(16, 0xD000).mov("al", 2).out(PORT_LOG + 2).raw("cf")  # iret
    registers = machine.long(code)
    machine.memory.write(0xC000, second.build())
    machine.memory.write(0xD000, on_nmi.build())
    machine.memory.write(2 * 4, (0xD000).to_bytes(4, "little"))
    machine.log.answer = lambda offset, size: int(len(machine.log.values) >= offset - 2)
    ap = machine.spawn(1)
    assert machine.finish(registers) == 1
    ap.join(kick=True)
    assert machine.log.values == [1, 2]


def test_two_vcpus_run_at_the_same_time_as_far_as_they_can_tell(make_machine: Callable[..., Machine]) -> None:
    """Ping-pong through memory: each waits for the other's store."""
    machine = make_machine(vcpus=2)
    rounds = 50
    first = start_ap(enabled(), 0xC).mov("rbx", 0x4FF0).mov("ecx", 0)
    first.label("next").inc("ecx").store("rbx", "ecx")  # my turn done: [rbx] = n
    first.label("wait").raw("39 4b 04").j("nz", "wait")  # cmp [rbx + 4], ecx
    first.cmp("ecx", rounds).j("nz", "next").mov("al", 1).stop()
    # wait: mov eax, [0x4ff0]; mov [0x4ff4], eax; jmp
    second = Code(16, 0xC000).raw("31 c0 8e d8").label("next").raw("66 a1 f0 4f 66 a3 f4 4f").jmp("next")
    registers = machine.long(first)
    machine.memory.write(0xC000, second.build())
    machine.memory.write(0x4FF0, bytes(8))
    ap = machine.spawn(1)
    assert machine.finish(registers) == 1
    assert ap.join(kick=True).reason == StopReason.KICKED


def test_kicking_one_vcpu_leaves_the_other_running(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    machine.vcpus[0].set_registers(machine.long(Code().label("spin").jmp("spin")))
    first, second = machine.spawn(0), machine.spawn(1)
    time.sleep(0.02)
    assert second.join(kick=True).reason == StopReason.KICKED
    assert first.stop is None
    assert first.join(kick=True).reason == StopReason.KICKED


def test_guest_reads_its_own_apic_id(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(vcpus=2)
    code = Code().mov("rbx", LAPIC + 0x20).load("eax", "rbx").stop(4)
    assert machine.finish(machine.long(code)) >> 24 == 0


@pytest.mark.parametrize("vcpus", [8, 32])
def test_many_vcpus_can_be_made_and_wait(make_machine: Callable[..., Machine], vcpus: int) -> None:
    machine = make_machine(vcpus=vcpus)
    running = [machine.spawn(index) for index in range(1, vcpus)]
    assert machine.finish(machine.long(Code().mov("al", 1).stop())) == 1
    for each in running:
        assert each.join(kick=True).reason == StopReason.KICKED
