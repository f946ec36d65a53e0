"""Linux on the WHP backend, away from Windows over the simulator: vsock commands, a disk, one and two vCPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("iced_x86")
pytest.importorskip("unicorn")

from microvm import DiskConfig, Sandbox
from microvm.testing.simulated_whp import PROFILES, SimulatedWhp

pytestmark = [pytest.mark.boots, pytest.mark.timeout(180)]


@pytest.fixture(params=[*PROFILES] if sys.platform != "win32" else ["windows"])
def profile(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "windows":
        yield "windows"
        return
    whp = SimulatedWhp(request.param)
    with whp.installed():
        yield request.param
    assert whp.error is None
    assert not whp.partitions, "every partition was deleted"


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("kind", ["tuned", "cloud"])
def test_linux_boots_and_runs_commands(
    kernel: Callable[[str], Any],
    image: Any,
    kind: str,
    cpus: int,
    profile: str,
    scratch_disk: Path,
    nothing_left: None,
) -> None:
    disks = [DiskConfig(scratch_disk)]
    with Sandbox(image.path, kernel=kernel(kind).name, cpus=cpus, backend="whp", disks=disks, isolated=False) as made:
        assert made.backend == "whp"
        assert made.run(["nproc"]).stdout == b"%d\n" % cpus
        assert made.run(["python3", "-c", "print(6 * 7)"], check=True).stdout == b"42\n"
        data = bytes(range(256)) * 4096
        assert made.run(["cat"], input=data).stdout == data
        made.run("echo kept | dd of=/dev/vdb bs=512 count=1 conv=sync,fsync", check=True)
        clock = made.run("cat /sys/devices/system/clocksource/clocksource0/current_clocksource").stdout
        assert clock == (b"tsc\n" if profile == "win10-19045" else b"hyperv_clocksource_tsc_page\n")
        assert made.run("sleep 0.2; exit 3").returncode == 3
    assert scratch_disk.read_bytes()[:5] == b"kept\n"


@pytest.mark.parametrize("cpus", [1, 2])
def test_restored_sandbox_goes_on(any_kernel: Any, image: Any, cpus: int, profile: str, tmp_path: Path) -> None:
    """The clocks and timers of a saved guest still run: a sleep ends, and what was in memory is there."""
    path = tmp_path / "saved"
    with Sandbox(image.path, kernel=any_kernel.name, cpus=cpus, backend="whp", isolated=False) as made:
        made.run("echo kept > /root/note", check=True)
        made.snapshot(path)
        assert made.run("cat /root/note").stdout == b"kept\n"
    with Sandbox.from_snapshot(path, isolated=False) as again:
        assert again.backend == "whp"
        assert again.run("cat /root/note; sleep 0.3; nproc", timeout=30).stdout == b"kept\n%d\n" % cpus
