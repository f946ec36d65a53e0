"""Exits that end a run, said in one sentence."""

from __future__ import annotations

import pytest

from microvm.hypervisor.kvm import abi
from microvm.hypervisor.kvm.exits import crash_detail


def exit_with(reason: int) -> abi.kvm_run:
    run = abi.kvm_run()
    run.exit_reason = reason
    return run


def test_emulation_failure_shows_the_instruction() -> None:
    run = exit_with(abi.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_EMULATION
    run.internal.ndata = 3
    run.internal.data[0] = 1
    raw = bytes((5, 0xF0, 0x48, 0x0F, 0xC7, 0x0F)).ljust(16, b"\0")
    run.internal.data[1] = int.from_bytes(raw[:8], "little")
    run.internal.data[2] = int.from_bytes(raw[8:], "little")
    assert crash_detail(run) == "KVM could not emulate an instruction: f0 48 0f c7 0f"


def test_emulation_failure_with_an_absurd_length_stays_in_bounds() -> None:
    run = exit_with(abi.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_EMULATION
    run.internal.ndata = 0xFFFF_FFFF
    run.internal.data[0] = 1
    run.internal.data[1] = 0xFF
    assert len(crash_detail(run)) < 120


@pytest.mark.parametrize("suberror", [2, 3, 4, 77])
def test_other_internal_errors_are_sentences(suberror: int) -> None:
    run = exit_with(abi.KVM_EXIT_INTERNAL_ERROR)
    run.internal.suberror = suberror
    run.internal.ndata = 200
    assert "KVM" in crash_detail(run) or "processor" in crash_detail(run)


def test_refused_entry_tells_the_hardware_code() -> None:
    run = exit_with(abi.KVM_EXIT_FAIL_ENTRY)
    run.fail_entry.hardware_entry_failure_reason = 0x8000_0021
    assert "0x80000021" in crash_detail(run)
    assert "state" in crash_detail(run)


def test_exit_nobody_asked_for_is_named() -> None:
    assert "KVM_EXIT_DEBUG" in crash_detail(exit_with(abi.KVM_EXIT_DEBUG))
    assert "KVM_EXIT_HLT" in crash_detail(exit_with(abi.KVM_EXIT_HLT))


def test_exit_of_the_future_is_numbered() -> None:
    assert "4711" in crash_detail(exit_with(4711))


def test_guest_that_reports_its_own_crash_is_heard() -> None:
    run = exit_with(abi.KVM_EXIT_SYSTEM_EVENT)
    run.system_event.type = abi.KVM_SYSTEM_EVENT_CRASH
    assert "crash" in crash_detail(run)
