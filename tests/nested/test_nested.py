"""The KVM backend on real virtualization instructions, on a machine without them: see `l1.py`."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import l1

from microvm.hypervisor import select

pytestmark = [pytest.mark.boots, pytest.mark.timeout(600)]

TIMEOUT_S = 240.0
KICKS = "2000"


def nested(arguments: list[str], environment: dict[str, str]) -> l1.Result:
    """Run in the first-level guest; one retry if it never got to the end."""
    reason = l1.missing()
    if reason:
        if "kvm" in os.environ.get("MICROVM_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    for _ in range(2):
        result = l1.run(arguments, environment, TIMEOUT_S)
        if result.status is not None:
            break
    assert result.status is not None, f"the first-level guest did not finish:\n{result.output[-3000:]}"
    return result


def test_conformance_passes_under_kvm_without_a_gap() -> None:
    if select.probe("kvm").usable:
        pytest.skip("this machine's own KVM works; the suite runs on it directly")
    arguments = "-m pytest -q -p no:cacheprovider -p pytest_timeout --color=no --tb=short -k kvm tests/conformance"
    result = nested(arguments.split(), {"MICROVM_REQUIRE": "kvm", "MICROVM_KICKS": KICKS})
    assert result.status == 0, result.output[-6000:]
    assert " passed" in result.output


def test_probe_finds_nested_kvm_usable_and_fast() -> None:
    program = (
        "from microvm.hypervisor.select import automatic; a = automatic(); print('@@auto', a.name, a.usable, a.mips)"
    )
    result = nested(["-c", program], {})
    line = next(line for line in result.output.splitlines() if line.startswith("@@auto"))
    assert line.split()[1:3] == ["kvm", "True"]
    assert float(line.split()[3]) > 50
