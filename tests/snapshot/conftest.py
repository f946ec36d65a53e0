"""Real machines on the smallest image and the quickest kernel there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm import MicroVM, Sandbox
from microvm.errors import MicroVMError


def missing(what: str, reason: str) -> Any:
    """Skip, or fail if what is missing is required."""
    required = ",".join(os.environ.get(name, "") for name in ("MICROVM_REQUIRE", "MICROVM_REQUIRE_GUESTS"))
    if what in required.split(","):
        pytest.fail(f"{what} is required: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def guests() -> str:
    """The image to use; without it, a kernel and a backend that can fork, everything here is skipped."""
    from microvm.errors import ConfigError
    from microvm.hypervisor.select import choose
    from microvm.images import images, kernels

    try:
        kernels.resolve(None)
        images.resolve("base")
    except ConfigError as error:
        missing("base", str(error))
    try:
        name = choose("auto").name
    except MicroVMError as error:
        missing("soft", str(error))
    if name != "soft":
        pytest.skip(f"auto takes {name}, whose machines cannot be forked")
    return "base"


@pytest.fixture
def local(guests: str) -> Iterator[Sandbox]:
    """A sandbox that was booted in this process."""
    with Sandbox(guests, cold=True, isolated=False, memory_mib=128) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(guests: str) -> Iterator[Sandbox]:
    """A sandbox as everybody gets it: restored, in a worker."""
    with Sandbox(guests, memory_mib=128) as found:
        yield found


@pytest.fixture
def agent() -> Iterator[Callable[[MicroVM], Any]]:
    """Start a restored machine, and talk to its agent."""
    from microvm.agent.client import AgentClient
    from microvm.agent.protocol import PORT

    clients = []

    def connect(vm: MicroVM) -> AgentClient:
        vm.start()
        client = AgentClient(lambda: vm.vsock.connect(PORT, 30))
        client.renew()
        clients.append(client)
        return client

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def snapshot(local: Sandbox, tmp_path: Path) -> Path:
    """A snapshot of a booted sandbox with something in it."""
    local.run("echo kept > /tmp/file; cat /bin/busybox > /dev/null")
    path = tmp_path / "full.mvs"
    local.snapshot(path)
    return path
