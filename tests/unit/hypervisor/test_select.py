"""The automatic choice."""

from __future__ import annotations

import pytest

from microvm.errors import BackendUnavailable, ConfigError
from microvm.hypervisor import select
from microvm.hypervisor.base import Availability


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Availability]:
    """What probing finds, for the test to fill in."""
    table = {"whp": Availability("whp", False, "not Windows")}
    monkeypatch.setattr(select, "probe", lambda name: table[name])
    return table


def test_fastest_backend_that_passes_is_taken(found: dict[str, Availability]) -> None:
    found["kvm"] = Availability("kvm", True, "", accelerated=True, mips=300)
    found["soft"] = Availability("soft", True, "", mips=700)
    assert select.automatic().name == "soft"
    found["kvm"] = Availability("kvm", True, "", accelerated=True, mips=800)
    assert select.automatic().name == "kvm"


def test_kvm_that_only_emulates_is_not_taken_however_it_is_measured(found: dict[str, Availability]) -> None:
    found["kvm"] = Availability("kvm", False, "only emulates supervisor code", "enable it", mips=9_000)
    found["soft"] = Availability("soft", True, "", mips=1)
    assert select.automatic().name == "soft"


def test_fast_hardware_is_taken_without_measuring_the_rest(found: dict[str, Availability]) -> None:
    found["kvm"] = Availability("kvm", True, "", accelerated=True, mips=4_000)
    assert select.automatic().name == "kvm"


def test_no_backend_is_one_sentence_with_every_reason(found: dict[str, Availability]) -> None:
    found["kvm"] = Availability("kvm", False, "no such file", "load the module")
    found["soft"] = Availability("soft", False, "unicorn is missing", "pip install it")
    with pytest.raises(
        BackendUnavailable, match=r"kvm: no such file; whp: not Windows; soft: unicorn is missing"
    ) as caught:
        select.automatic()
    assert caught.value.hint


def test_on_windows_the_hint_is_how_to_switch_the_platform_on(
    found: dict[str, Availability], monkeypatch: pytest.MonkeyPatch
) -> None:
    found["kvm"] = Availability("kvm", False, "no such file", "load the module")
    found["whp"] = Availability("whp", False, "no hypervisor is running", "switch it on")
    found["soft"] = Availability("soft", False, "not on this system", "use a hardware backend")
    monkeypatch.setattr(select.sys, "platform", "win32")
    with pytest.raises(BackendUnavailable) as caught:
        select.automatic()
    assert caught.value.hint == "switch it on"


def test_unknown_name_is_the_callers_mistake() -> None:
    with pytest.raises(ConfigError, match="auto, kvm, whp, soft"):
        select.choose("xen")


def test_missing_library_is_unavailable_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(select._BACKENDS, "soft", ("microvm.hypervisor.absent", "Nothing", "pip install it"))
    with pytest.raises(BackendUnavailable) as caught:
        select.load("soft")
    assert caught.value.hint == "pip install it"


def test_a_backend_asked_for_by_name_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(name: str) -> Availability:
        raise AssertionError

    monkeypatch.setattr(select, "probe", never)
    assert select.choose("kvm").name == "kvm"


def test_one_slow_moment_of_the_host_does_not_make_a_backend_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of microseconds that was preempted for milliseconds once read as an emulating KVM."""
    from microvm.hypervisor import trial

    clock = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: clock[0])
    result = trial.Trial()
    device = trial._Device(result, None)  # type: ignore[arg-type]
    turns = device.pio_read(0, 4)
    slow = {1: 0.004, 3: 0.1}  # the first and the third measurement were interrupted
    rounds = 0
    while turns:
        clock[0] += 2 * turns / 1e9 + slow.get(rounds, 0)
        turns = device.pio_read(0, 4)
        rounds += 1
        assert rounds < 20
    assert result.mips == pytest.approx(1000, rel=0.01)
