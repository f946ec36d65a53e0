"""Distribution kernels, where one is at hand: bzImages named by MICROVM_TEST_KERNELS, or in the kernel cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm import boot
from microvm.memory import GuestMemory


def kernels() -> list[Path]:
    named = os.environ.get("MICROVM_TEST_KERNELS")
    if named:
        return [Path(name) for name in named.split(os.pathsep)]
    cache = Path(os.environ.get("MICROVM_CACHE") or Path.home() / ".cache" / "microvm")
    found = [path for pattern in ("**/vmlinuz*", "**/bzImage*") for path in sorted(cache.glob(pattern))]
    return [path for path in found if path.is_file()]


@pytest.fixture(params=["unpacked", "as it is"])
def unpack(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "unpacked")


def test_distribution_kernels_load(unpack: bool) -> None:
    found = kernels()
    if not found:
        pytest.skip("no kernel in the cache, and MICROVM_TEST_KERNELS is not set")
    for path in found:
        with path.open("rb") as file:
            state = boot.load(
                GuestMemory.allocate(256 << 20),
                file,
                [b"initrd"],
                "console=ttyS0",
                2,
                [boot.virtio_slot(0)],
                (),
                unpack,
            )
        assert state.kernel_start == 0x100_0000
        assert state.protocol in (("pvh", "linux64", "bzimage") if unpack else ("bzimage",))
        assert state.kernel_start <= state.entry < state.kernel_end
