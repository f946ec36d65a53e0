"""The real agent as an ordinary process. The tests need nothing but `connect`, so that a VM can take its place."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm.agent.client import AgentClient

BINARY = Path(__file__).parents[2] / "src/microvm/agent/guest/agent-x86_64"
CGROUP_ROOTS = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]

Connect = Callable[[], socket.socket]


@contextlib.contextmanager
def control_group() -> Iterator[Path | None]:
    """A cgroup v2 directory of our own, or None where that cannot be had."""
    root = next((root for root in CGROUP_ROOTS if (root / "cgroup.procs").exists()), None)
    folder = root / f"microvm-test-{os.getpid()}" if root else None
    try:
        if folder:
            folder.mkdir()
    except OSError:
        folder = None
    if folder is None or not (folder / "cgroup.kill").exists():
        yield None
        return
    try:
        yield folder
    finally:
        (folder / "cgroup.kill").write_text("1")
        for _ in range(100):
            if "populated 0" in (folder / "cgroup.events").read_text():
                break
            time.sleep(0.02)
        for child in folder.iterdir():
            if child.is_dir():
                child.rmdir()
        folder.rmdir()


class Agent:
    """An agent that runs for the tests."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.path = path

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return sock

    def open_files(self) -> list[str]:
        return os.listdir(f"/proc/{self.process.pid}/fd")

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(word) for word in text.split()]


@contextlib.contextmanager
def running_agent(folder: Path, cgroup: Path | None = None) -> Iterator[Agent]:
    if not BINARY.exists():
        if not (shutil.which("musl-gcc") or shutil.which("gcc")):
            pytest.skip("no compiler for the guest agent")
        subprocess.run(["python3", "setup.py", "build_native"], cwd=BINARY.parents[4], check=True)
    path = folder / "agent.sock"
    options = ["--test-cgroup", str(cgroup)] if cgroup else []
    process = subprocess.Popen([BINARY, "--test-socket", path, *options], cwd="/")
    agent = Agent(process, path)
    try:
        for _ in range(500):
            with contextlib.suppress(OSError):
                agent.connect().close()
                break
            time.sleep(0.01)
        yield agent
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session", params=["cgroup", "session"])
def agent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    folder = tmp_path_factory.mktemp("agent")
    if request.param == "session":
        with running_agent(folder) as agent:
            yield agent
        return
    with control_group() as cgroup:
        if cgroup is None:
            pytest.skip("no writable cgroup v2 here")
        with running_agent(folder, cgroup) as agent:
            yield agent


@pytest.fixture
def connect(agent: Agent) -> Connect:
    return agent.connect


@pytest.fixture
def client(connect: Connect) -> Iterator[AgentClient]:
    with AgentClient(connect, request_timeout_s=30) as client:
        yield client
