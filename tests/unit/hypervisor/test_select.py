"""The automatic choice."""

from __future__ import annotations

import pytest

from microvm.errors import BackendUnavailable, ConfigError
from microvm.hypervisor import select
from microvm.hypervisor.base import Availability


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Availability]:
    """What probing finds, for the test to fill in."""
    table: dict[str, Availability] = {}
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
    with pytest.raises(BackendUnavailable, match=r"kvm: no such file; soft: unicorn is missing") as caught:
        select.automatic()
    assert caught.value.hint


def test_unknown_name_is_the_callers_mistake() -> None:
    with pytest.raises(ConfigError, match="auto, kvm, soft"):
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
