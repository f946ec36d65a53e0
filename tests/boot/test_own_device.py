"""A device of the user's own, and the guest's sockets reached by a path: what the README promises."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm import DiskConfig, MachineConfig, MicroVM
from microvm.agent.client import AgentClient
from microvm.api import agent_program
from microvm.images import initrd
from microvm.spec.virtio import DeviceId
from microvm.virtio import Chain, QueueSpec, VirtioDevice

from .conftest import BACKEND

pytestmark = [pytest.mark.boots, pytest.mark.timeout(120)]
AGENT_PORT = 1024


class Dice(VirtioDevice):
    """An entropy device whose bytes are throws of a die."""

    device_id = DeviceId.ENTROPY
    queues = (QueueSpec("requests", 8),)

    def on_requests(self, chain: Chain) -> int:
        return chain.write(bytes(1 + i % 6 for i in range(min(chain.writable_bytes, 64))))


def _machine(kernel: Any, image: Any, **settings: Any) -> MachineConfig:
    parts = [] if kernel.initrd is None else [kernel.initrd]
    return MachineConfig(
        kernel.path,
        initrds=[*parts, initrd.agent_initrd(agent_program())],
        cmdline="console=ttyS0 quiet panic=-1 microvm.root=/dev/vda",
        disks=[DiskConfig(image.path, read_only=True)],
        backend=BACKEND,
        **settings,
    )


def test_guest_reads_from_a_device_written_by_the_user(any_kernel: Any, image: Any) -> None:
    with MicroVM(_machine(any_kernel, image, rng=False), devices=[Dice()]) as vm:
        with vm.vsock.listen(AGENT_PORT) as listener:
            vm.start()
            with listener.accept(60) as ready:
                agent = AgentClient(lambda: vm.vsock.connect(AGENT_PORT, 10))
                agent.wait_ready(ready, 60)
        throws = agent.run(["head", "-c", "60", "/dev/hwrng"], timeout=30).stdout
        agent.close()
    assert len(throws) == 60
    assert set(throws) <= set(range(1, 7))


def test_other_programs_reach_the_guest_by_the_vsock_path(
    kernel: Callable[[str], Any], image: Any, tmp_path: Path
) -> None:
    path = tmp_path / "guest.sock"
    with MicroVM(_machine(kernel("tuned"), image, vsock_path=path)) as vm:
        ready = socket.socket(socket.AF_UNIX)
        ready.bind(f"{path}_{AGENT_PORT}")  # the guest connects to port 1024 of the host when it is up
        ready.listen()
        ready.settimeout(60)
        vm.start()
        arrived, _ = ready.accept()
        ready.close()

        def connect() -> socket.socket:
            made = socket.socket(socket.AF_UNIX)
            made.settimeout(10)
            made.connect(str(path))
            made.sendall(b"CONNECT %d\n" % AGENT_PORT)
            answer = b""
            while not answer.endswith(b"\n"):
                answer += made.recv(1)
            assert answer.startswith(b"OK ")
            return made

        agent = AgentClient(connect)
        agent.wait_ready(arrived, 60)
        assert agent.run(["echo", "through the door"], timeout=30).stdout == b"through the door\n"
        agent.close()
    assert not path.exists()
