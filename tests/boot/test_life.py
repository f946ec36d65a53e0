"""From the first to the last: disks, memory, orderly ends, and nothing left behind."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm import DiskConfig, ExecError, Sandbox, StateError

from .conftest import BACKEND

pytestmark = [pytest.mark.boots, pytest.mark.timeout(300)]


@pytest.fixture
def make(any_kernel: Any, image: Any) -> Callable[..., Sandbox]:
    def build(**settings: Any) -> Sandbox:
        settings.setdefault("isolated", False)
        return Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND, **settings)

    return build


def rss_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20


def test_disk_written_by_the_guest_is_on_the_host(make: Callable[..., Sandbox], scratch_disk: Path) -> None:
    with make(disks=[scratch_disk]) as sandbox:
        assert sandbox.run("cat /sys/block/vdb/size").stdout == b"32768\n"
        sandbox.run("echo hello | dd of=/dev/vdb bs=512 seek=7 conv=notrunc,sync oflag=direct", check=True)
        assert scratch_disk.read_bytes()[7 * 512 :][:6] == b"hello\n"
        sandbox.run("echo again | dd of=/dev/vdb bs=512 seek=9 conv=notrunc,sync", check=True)
    assert scratch_disk.read_bytes()[9 * 512 :][:6] == b"again\n"


def test_read_only_disk_cannot_be_written(make: Callable[..., Sandbox], scratch_disk: Path) -> None:
    with make(disks=[DiskConfig(scratch_disk, read_only=True)]) as sandbox:
        result = sandbox.run("dd if=/dev/urandom of=/dev/vdb bs=512 count=1 oflag=direct")
        assert result.returncode != 0
        assert sandbox.run("cat /sys/block/vdb/ro").stdout == b"1\n"
    assert scratch_disk.read_bytes() == bytes(16 << 20)


def test_shutdown_is_in_order(make: Callable[..., Sandbox], nothing_left: None) -> None:
    sandbox = make()
    sandbox.boot()
    outcome = sandbox.shutdown()
    assert outcome is not None
    assert outcome.kind in ("powered off", "reset")
    assert sandbox.closed
    with pytest.raises(StateError, match="closed"):
        sandbox.run("true")
    sandbox.close()


def test_unbooted_sandbox_refuses(make: Callable[..., Sandbox]) -> None:
    sandbox = make()
    with pytest.raises(StateError, match="not been booted"):
        sandbox.run("true")
    with pytest.raises(StateError, match="not been booted"):
        _ = sandbox.vm
    sandbox.close()
    with pytest.raises(StateError):
        sandbox.boot()


def test_close_under_running_commands_wakes_everybody(make: Callable[..., Sandbox], nothing_left: None) -> None:
    sandbox = make()
    sandbox.boot()
    errors: list[BaseException] = []

    def sleeper() -> None:
        try:
            sandbox.run(["sleep", "100"])
        except (ExecError, StateError) as error:
            errors.append(error)

    threads = [threading.Thread(target=sleeper) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    sandbox.close()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 4


def test_balloon_gives_memory_back(make: Callable[..., Sandbox]) -> None:
    with make(memory_mib=256) as sandbox:
        sandbox.run("dd if=/dev/zero of=/tmp/fill bs=1M count=80 && rm /tmp/fill", check=True)
        sandbox.vm.set_balloon(128)
        deadline = time.monotonic() + 30
        while sandbox.info().memory_available > 130 << 20:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        sandbox.vm.set_balloon(0)
        assert sandbox.run("echo alive").stdout == b"alive\n"


def test_program_that_forgets_to_close_still_ends(any_kernel: Any, image: Any) -> None:
    program = (
        "import microvm, sys\n"
        f"s = microvm.Sandbox({str(image.path)!r}, kernel={any_kernel.name!r}, backend={BACKEND!r})\n"
        "s.boot(); print(s.run('echo ran').stdout_text, end='', flush=True); sys.exit(4)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, b"ran\n", b"")


def test_three_sandboxes_side_by_side(make: Callable[..., Sandbox], nothing_left: None) -> None:
    made = [make(memory_mib=128) for _ in range(3)]
    threads = [threading.Thread(target=sandbox.boot) for sandbox in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made[1].close()
    assert made[0].run("echo a").stdout == b"a\n"
    assert made[2].run("echo c").stdout == b"c\n"
    for sandbox in made:
        sandbox.close()
