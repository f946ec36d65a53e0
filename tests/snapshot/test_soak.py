"""Sandboxes by the hundred: every result is right, and nothing is left."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest

from microvm import Sandbox
from microvm.workers import client

pytestmark = [pytest.mark.boots, pytest.mark.soak, pytest.mark.timeout(1800)]

CYCLES = int(os.environ.get("MICROVM_SOAK_CYCLES", "1000"))
FORKS = int(os.environ.get("MICROVM_SOAK_FORKS", "200"))


def state(zygote: int) -> dict[str, int]:
    gc.collect()
    found = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
    found["zygote descriptors"] = len(os.listdir(f"/proc/{zygote}/fd"))
    found["children"] = sum(
        1
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == zygote  # workers, alive or waiting to be buried
    )
    for name, pid in (("rss", "self"), ("zygote rss", str(zygote))):
        with open(f"/proc/{pid}/statm") as file:
            found[name] = int(file.read().split()[1]) * 4096 >> 20
    return found


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


def settled(before: dict[str, int], zygote: int) -> dict[str, int]:
    for _ in range(50):
        after = state(zygote)
        if after["children"] <= before["children"] and after["descriptors"] <= before["descriptors"]:
            break
        time.sleep(0.1)
    return after


def test_nothing_is_left_of_many_sandboxes_and_forks(guests: str) -> None:
    for _ in range(3):
        with Sandbox(guests, memory_mib=128) as sandbox:
            sandbox.run(["true"])
            name = next(name for name, zygote in client._zygotes.items() if zygote.alive)
    del sandbox
    pid = client._zygotes[name]._process.pid
    files = set(os.listdir("/tmp"))
    before = state(pid)
    for number in range(CYCLES):
        with Sandbox(guests, memory_mib=128) as box:
            assert box.run(["echo", str(number)]).stdout == b"%d\n" % number
    with Sandbox(guests, memory_mib=128) as box:
        for number in range(FORKS):
            (child,) = box.fork()
            assert isinstance(child, Sandbox), child
            with child:
                assert child.run(["echo", str(number)]).stdout == b"%d\n" % number
    after = settled(before, pid)
    for what in ("descriptors", "threads", "zygote descriptors", "children"):
        assert after[what] <= before[what], (what, before, after)
    for what in ("rss", "zygote rss"):
        assert after[what] <= before[what] + 8, (what, before, after)
    assert {name for name in set(os.listdir("/tmp")) - files if name.startswith("microvm")} == set()
