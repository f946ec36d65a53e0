"""Real kernels and images, found in the cache; what is missing is skipped, or fails where it is required.

``MICROVM_REQUIRE`` names backends, as everywhere, ``MICROVM_REQUIRE_GUESTS`` kernels, images and tools.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KINDS = ("tuned", "cloud", "generic")
BACKEND = os.environ.get("MICROVM_TEST_BACKEND", "auto")


def missing(what: str, reason: str) -> Any:
    """Skip, or fail if one of the two lists names ``what``."""
    required = ",".join(os.environ.get(name, "") for name in ("MICROVM_REQUIRE", "MICROVM_REQUIRE_GUESTS"))
    if what in required.split(","):
        pytest.fail(f"{what} is required: {reason}")
    pytest.skip(reason)


@functools.cache
def _kernel(kind: str) -> Any:
    from microvm.errors import ConfigError
    from microvm.images import kernels

    try:
        return kernels.resolve(kind)
    except ConfigError as error:
        return str(error)


@functools.cache
def _image(name: str) -> Any:
    from microvm.errors import ConfigError
    from microvm.images import images

    try:
        return images.resolve(name)
    except ConfigError as error:
        return str(error)


@pytest.fixture(scope="session")
def kernel() -> Callable[[str], Any]:
    """``kernel("cloud")``: a kernel of that kind, or a skip."""

    def find(kind: str) -> Any:
        found = _kernel(kind)
        return missing(kind, found) if isinstance(found, str) else found

    return find


@pytest.fixture(scope="session")
def any_kernel() -> Any:
    """The quickest kernel there is."""
    for kind in KINDS:
        if not isinstance(found := _kernel(kind), str):
            return found
    return missing("tuned", "no kernel in the cache: run `microvm kernel fetch cloud`")


@pytest.fixture(scope="session")
def image() -> Any:
    """The python image, or a skip."""
    found = _image("python")
    return missing("python", found) if isinstance(found, str) else found


@pytest.fixture(scope="session", autouse=True)
def backend() -> str:
    """The backend that boot tests use; without one they are skipped."""
    from microvm.errors import MicroVMError
    from microvm.hypervisor.select import choose

    try:
        return choose(BACKEND).name
    except MicroVMError as error:
        return str(missing("soft", str(error)))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test leaves no thread and no descriptor behind."""

    def descriptors() -> dict[str, str]:
        found = {}
        for fd in os.listdir("/proc/self/fd"):
            try:
                found[fd] = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                pass
        return found

    from microvm.workers.client import close_zygotes

    before, threads = descriptors(), set(threading.enumerate())
    yield
    close_zygotes()  # they stay for the next sandbox of their kind, as long as the process lives
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads left behind: {left}"
    opened = {fd: name for fd, name in descriptors().items() if fd not in before}
    assert not opened, f"descriptors left behind: {opened}"


@pytest.fixture
def scratch_disk(tmp_path: Path) -> Path:
    """An empty disk of 16 MiB."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    return path
