"""The KVM backend on real virtualization instructions, on a machine without them: see `l1.py`."""

from __future__ import annotations

import os
import re
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


# Two halves at once, on the two processors of the first-level guest.
CONFORMANCE = """
import subprocess, sys
base = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--color=no"]
base += ["--tb=short", "--assert=plain", "-k", "kvm"]
running = []
for half in ("io",), ("exceptions", "cpuid_msr", "interrupts", "memory", "state"):
    files = [f"tests/conformance/test_{name}.py" for name in half]
    running.append(subprocess.Popen(base + files, stdout=subprocess.PIPE, text=True))
for process in running:
    print(process.communicate()[0], flush=True)
print("@@halves", [process.returncode for process in running])
"""


def test_conformance_passes_under_kvm_without_a_gap() -> None:
    if select.probe("kvm").usable:
        pytest.skip("this machine's own KVM works; the suite runs on it directly")
    result = nested(["-c", CONFORMANCE], {"MICROVM_REQUIRE": "kvm", "MICROVM_KICKS": KICKS})
    assert "@@halves [0, 0]" in result.output, result.output[-6000:]
    passed = sum(int(count) for count in re.findall(r"(\d+) passed", result.output))
    assert passed > 200
    assert "kvm here:" not in result.output


# Automatic choice must take KVM there. The command once; then sandboxes of the library, which starts no interpreter.
LINUX = """
import subprocess, sys, time
from microvm.hypervisor.select import automatic
found = automatic()
print("@@auto", found.name, found.usable, found.mips)
command = [sys.executable, "-m", "microvm", "run", "--image", "base", "-v"]
done = subprocess.run([*command, "--", "sh", "-c", "echo hello; nproc; exit 41"], capture_output=True, text=True)
print("@@run", 1, done.returncode, done.stdout.split(), "on kvm" in done.stderr, flush=True)
if done.returncode != 41:
    print(done.stderr[-3000:])
import microvm
for cpus in (2, 4):
    started = time.monotonic()
    with microvm.Sandbox("base", cpus=cpus, cold=True, isolated=False) as sandbox:
        answer = sandbox.run(["sh", "-c", f"echo hello; nproc; exit {cpus + 40}"])
    out = answer.stdout.split()
    print("@@run", cpus, answer.returncode, [w if type(w) is str else w.decode() for w in out], True, flush=True)
    print("took", round(time.monotonic() - started, 1), "booted in", sandbox.boot_seconds, flush=True)
"""


def test_linux_boots_on_automatically_chosen_kvm_with_one_two_and_four_vcpus() -> None:
    result = nested(["-c", LINUX], {}, files=l1.guest_files)
    name, usable, mips = re.search(r"^@@auto (\S+) (\S+) (\S+)", result.output, re.M).groups()  # type: ignore[union-attr]
    assert (name, usable) == ("kvm", "True")
    assert float(mips) > 50
    lines = [line for line in result.output.splitlines() if line.startswith("@@run")]
    assert lines == [f"@@run {n} {n + 40} ['hello', '{n}'] True" for n in (1, 2, 4)], result.output[-4000:]
