"""The shim lets stores pass unseen only where no translated code can be: every way a store could slip by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from microvm.errors import BackendUnavailable
from microvm.hypervisor import select
from microvm.hypervisor.base import Hypervisor, PartitionConfig

from .asm import Code
from .machine import CODE, DATA, PD, PORT_STOP, Machine

FUNCTION = 0x20_0000
ALIAS = 0x60_0000
SECOND = 0x800  # of another function on the same page
NO_EXECUTE = 1 << 63


@pytest.fixture
def soft() -> Hypervisor:
    try:
        backend = select.load("soft")
        backend.create_partition(PartitionConfig()).close()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return backend


@pytest.fixture
def machine(soft: Hypervisor) -> Iterator[Machine]:
    with Machine(soft) as machine:
        yield machine


def constant(value: int) -> bytes:
    return Code(64).mov("eax", value).raw("c3").build()


def set_result(code: Code, at: int, value: int) -> Code:
    """Change what the function whose first byte is at ``at`` returns."""
    return code.mov("rdi", at + 1).mov("eax", value).store("rdi", "eax")


def call_and_add(code: Code, at: int) -> Code:
    return code.mov("rbx", at).raw("ff d3").raw("01 c6")  # call rbx; add esi, eax


def run(machine: Machine, code: Code, alias: int) -> int:
    registers = machine.long(code.move("eax", "esi").out(PORT_STOP, 4).hlt())
    machine.memory.write(PD + 8 * (ALIAS >> 21), (FUNCTION | 0x87 | alias).to_bytes(8, "little"))
    machine.memory.write(FUNCTION, constant(0))
    machine.memory.write(FUNCTION + SECOND, constant(0))
    return machine.finish(registers)


@pytest.mark.parametrize("alias", [0, NO_EXECUTE])
def test_an_alias_written_before_the_code_ran_does_not_stay_unseen(machine: Machine, alias: int) -> None:
    code = Code(64, CODE).raw("31 f6")
    for value in (1, 2, 4, 8):
        call_and_add(set_result(code, ALIAS, value), FUNCTION)
    assert run(machine, code, alias) == 15


@pytest.mark.parametrize("alias", [0, NO_EXECUTE])
def test_a_store_to_one_function_does_not_hide_the_next_to_its_neighbour(machine: Machine, alias: int) -> None:
    code = Code(64, CODE).raw("31 f6")
    call_and_add(call_and_add(code, FUNCTION), FUNCTION + SECOND)
    call_and_add(set_result(code, ALIAS, 1), FUNCTION)
    set_result(code, ALIAS, 2)  # the page is writable unseen from here on, if it can be
    call_and_add(set_result(code, ALIAS + SECOND, 4), FUNCTION + SECOND)
    assert run(machine, code, alias) == 5


@pytest.mark.parametrize("alias", [0, NO_EXECUTE])
def test_a_store_to_one_function_leaves_no_stale_neighbour(machine: Machine, alias: int) -> None:
    code = Code(64, CODE).raw("31 f6")
    call_and_add(call_and_add(code, FUNCTION), FUNCTION + SECOND)
    set_result(set_result(code, ALIAS, 1), ALIAS + SECOND, 4)  # one after the other, with nothing run in between
    call_and_add(call_and_add(code, FUNCTION), FUNCTION + SECOND)
    assert run(machine, code, alias) == 5


def test_a_store_after_reading_the_dirty_log_is_logged_again(soft: Hypervisor) -> None:
    with Machine(soft, track_dirty=True) as machine:
        code = Code(64, CODE).mov("rdi", DATA).mov("eax", 1).store("rdi", "eax").out(PORT_STOP, 4).hlt()
        registers = machine.long(code)
        for _ in range(2):
            machine.partition.dirty(0, machine.memory.size)
            machine.finish(registers)
            bitmap = machine.partition.dirty(0, machine.memory.size)
            assert bitmap[DATA >> 15] >> (DATA >> 12 & 7) & 1
            registers = machine.long(code)


def test_memory_is_right_while_a_walk_through_it_makes_the_tlb_grow(soft: Hypervisor) -> None:
    """8 MiB touched a page at a time, often enough for the TLB to be relieved several times."""
    rounds, pages, base = 40, 2048, 0x80_0000
    with Machine(soft, memory=base + 4096 * pages) as machine:
        code = Code(64, CODE).mov("edx", rounds)
        code.label("round").mov("rdi", base).mov("ecx", pages)
        code.label("page").load("eax", "rdi").inc("eax").store("rdi", "eax").add("rdi", 4096)
        code.dec("ecx").j("nz", "page").dec("edx").j("nz", "round").mov("eax", 1).out(PORT_STOP, 4).hlt()
        machine.finish(machine.long(code))
        words = {machine.memory.read(base + 4096 * page, 4) for page in range(pages)}
        assert words == {rounds.to_bytes(4, "little")}
