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
