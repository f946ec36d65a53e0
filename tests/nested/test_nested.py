"""The KVM backend on real virtualization instructions, on a machine without them: see `l1.py`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
import l1

from microvm.hypervisor import select

pytestmark = [pytest.mark.boots, pytest.mark.timeout(600)]

TIMEOUT_S = 240.0
KICKS = "2000"


def nested(arguments: list[str], environment: dict[str, str], files: Callable[[], dict[str, Path]] = dict) -> l1.Result:
    """Run in the first-level guest; one retry if it never got to the end."""
    reason = l1.missing()
    if reason:
        if "kvm" in os.environ.get("MICROVM_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    for _ in range(2):
        result = l1.run(arguments, environment, TIMEOUT_S, files=files())
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


LINUX = """
import subprocess, sys, time
for cpus in (1, 2):
    for word in ("first", "second"):
        started = time.monotonic()
        command = [sys.executable, "-m", "microvm", "run", "--image", "base", "--cpus", str(cpus), "-v"]
        command += ["--", "sh", "-c", f"echo {word}; nproc; exit {cpus + 40}"]
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = round(time.monotonic() - started, 1)
        print("@@run", cpus, done.returncode, done.stdout.split(), "on kvm" in done.stderr, seconds)
        if done.returncode != cpus + 40:
            print(done.stderr[-3000:])
"""


def test_linux_boots_and_runs_commands_with_one_and_two_vcpus() -> None:
    result = nested(["-c", LINUX], {}, files=l1.guest_files)
    lines = [line.rsplit(" ", 1)[0] for line in result.output.splitlines() if line.startswith("@@run")]
    words = ("first", "second")
    expected = [f"@@run {cpus} {cpus + 40} ['{word}', '{cpus}'] True" for cpus in (1, 2) for word in words]
    assert lines == expected, result.output[-4000:]
