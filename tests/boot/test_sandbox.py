"""Sandboxes on real kernels: what runs inside behaves as if it ran here."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import microvm
from microvm import PIPE, STDOUT, CommandFailed, ExecError, ExecTimeout, GuestFileNotFound, Sandbox, StateError
from microvm.workers import template

from .conftest import BACKEND, KINDS

pytestmark = [pytest.mark.boots, pytest.mark.timeout(180)]


@pytest.fixture(scope="module", params=["booted", "restored"])
def sandbox(any_kernel: Any, image: Any, request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    settings: dict[str, Any] = {"kernel": any_kernel.name, "backend": BACKEND, "isolated": False}
    cold = request.param == "booted"
    made = Sandbox(image.path, cold=cold, **settings)
    if not cold:
        config = template.decide(made.config)
        template.obtain(config, template.key(config))
    with made:
        yield made


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_boots_to_the_agent_and_runs_commands(
    kernel: Callable[[str], Any], image: Any, kind: str, cpus: int, nothing_left: None
) -> None:
    with Sandbox(image.path, kernel=kernel(kind).name, cpus=cpus, backend=BACKEND, cold=True) as made:
        assert made.run(["nproc"]).stdout == b"%d\n" % cpus
        assert made.run(["python3", "-c", "print(6 * 7)"], check=True).stdout == b"42\n"
        assert made.run("exit 3").returncode == 3
        made.files.write("/root/note", b"kept")
        assert made.files.read("/root/note") == b"kept"
    assert made.closed


@pytest.mark.parametrize("memory_mib", [64, 4608])
def test_smallest_memory_and_memory_beyond_the_hole_boot(
    kernel: Callable[[str], Any], image: Any, memory_mib: int
) -> None:
    with Sandbox(image.path, kernel=kernel("tuned").name, memory_mib=memory_mib, backend=BACKEND, cold=True) as made:
        assert made.run("echo ok").stdout == b"ok\n"
        total = made.info().memory_total >> 20
        assert memory_mib * 0.7 < total <= memory_mib


def test_output_streams_are_apart_or_merged(sandbox: Sandbox) -> None:
    result = sandbox.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert sandbox.run("echo out; echo err >&2", stderr=STDOUT).stdout == b"out\nerr\n"


@pytest.mark.parametrize("code", [0, 1, 7, 127, 255])
def test_exit_code_is_the_commands(sandbox: Sandbox, code: int) -> None:
    assert sandbox.run(f"exit {code}").returncode == code


@pytest.mark.parametrize("signal", [1, 2, 9, 11, 15])
def test_signal_that_ended_it_is_a_negative_code(sandbox: Sandbox, signal: int) -> None:
    assert sandbox.run(["/bin/sh", "-c", f"kill -{signal} $$"]).returncode == -signal


def test_check_raises_with_the_output(sandbox: Sandbox) -> None:
    with pytest.raises(CommandFailed) as caught:
        sandbox.run("echo before; exit 5", check=True)
    assert caught.value.stdout == b"before\n"


def test_input_of_every_byte_comes_back(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 4096
    assert sandbox.run(["cat"], input=data).stdout == data
    assert sandbox.run(["cat"], input="text").stdout_text == "text"
    assert sandbox.run(["cat"], input=b"").stdout == b""


def test_no_input_is_end_of_file(sandbox: Sandbox) -> None:
    assert sandbox.run(["cat"], timeout=30).stdout == b""


def test_big_output_arrives_whole(sandbox: Sandbox) -> None:
    result = sandbox.run("head -c 20000000 /dev/zero | tr '\\0' x")
    assert len(result.stdout) == 20_000_000
    assert result.stdout.count(b"x") == 20_000_000


def test_output_beyond_the_limit_is_an_error_and_the_sandbox_lives(sandbox: Sandbox) -> None:
    with pytest.raises(ExecError, match="more than the 1000 bytes"):
        sandbox.run(["yes"], max_output=1000)
    assert sandbox.run("echo alive").stdout == b"alive\n"


def test_timeout_ends_the_command_and_keeps_its_output(sandbox: Sandbox) -> None:
    begin = time.monotonic()
    with pytest.raises(ExecTimeout) as caught:
        sandbox.run("echo started; sleep 100", timeout=1)
    assert caught.value.stdout == b"started\n"
    assert time.monotonic() - begin < 10
    assert sandbox.run("ps | grep -c 'sleep 10[0]'").stdout.strip() == b"0"


def test_environment_directory_and_user(sandbox: Sandbox) -> None:
    result = sandbox.run("echo $A; pwd; id -u", env={"A": "b c"}, cwd="/tmp", user="nobody")
    assert result.stdout_text.split("\n")[:2] == ["b c", "/tmp"]
    assert int(result.stdout_text.split("\n")[2]) != 0


def test_commands_that_do_not_exist_say_so(sandbox: Sandbox) -> None:
    with pytest.raises(ExecError, match="no such file") as caught:
        sandbox.run(["/no/such/command"])
    assert caught.value.code == 2


def test_process_streams_and_signals(sandbox: Sandbox) -> None:
    with sandbox.start(["cat"], stdin=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        assert process.stdout.readline() == b"one\n"
        process.stdin.write(b"two\n")
        assert process.stdout.readline() == b"two\n"
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == -15


def test_terminal_has_its_size_and_is_resized(sandbox: Sandbox) -> None:
    with sandbox.start(["/bin/sh"], pty=(33, 101)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"stty size; echo end-$?\n")
        seen = read_until(process.stdout, b"end-0")
        assert b"33 101" in seen
        process.resize(40, 80)
        process.stdin.write(b"stty size; echo end-$?-\n")
        assert b"40 80" in read_until(process.stdout, b"end-0-")
        process.stdin.write(b"exit 9\n")
        assert process.wait(10) == 9


def read_until(stream: Any, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        data = stream.read1(4096)
        assert data, seen
        seen += data
    return bytes(seen)


def test_files_go_both_ways(sandbox: Sandbox, tmp_path: Path) -> None:
    files = sandbox.files
    files.write("/root/dir/file", b"x" * 100_000, parents=True, mode=0o600)
    assert [entry.name for entry in files.list("/root/dir")] == ["file"]
    assert files.stat("/root/dir/file").mode == 0o600
    with pytest.raises(GuestFileNotFound):
        files.read("/root/none")
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "data").write_bytes(os.urandom(200_000))
    files.put(tree, "/root/tree")
    files.get("/root/tree", tmp_path / "back")
    assert (tmp_path / "back" / "below" / "data").read_bytes() == (tree / "below" / "data").read_bytes()


def test_image_is_read_only_below_a_writable_root(sandbox: Sandbox) -> None:
    assert sandbox.run("echo x >/etc/written && cat /etc/written").stdout == b"x\n"
    assert sandbox.run("dd if=/dev/zero of=/dev/vda bs=512 count=1").returncode != 0


def test_many_commands_run_at_once(sandbox: Sandbox) -> None:
    results: dict[int, bytes] = {}

    def command(number: int) -> None:
        results[number] = sandbox.run(f"sleep 0.2; echo {number}").stdout

    threads = [threading.Thread(target=command, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: b"%d\n" % number for number in range(20)}


def test_clock_is_right(sandbox: Sandbox) -> None:
    guest = int(sandbox.run(["date", "+%s"]).stdout)
    assert abs(guest - time.time()) < 3


def test_paused_guest_stands_still_and_does_not_notice(sandbox: Sandbox) -> None:
    vm = sandbox.vm

    def uptime() -> float:
        return sandbox.info().uptime_s

    before = uptime()
    begin = time.monotonic()
    vm.pause()
    time.sleep(1.5)
    with pytest.raises(StateError):
        vm.pause()
    vm.resume()
    after = uptime()
    assert time.monotonic() - begin > 1.5
    assert after - before < 1.2
    assert sandbox.run("echo on").stdout == b"on\n"


def test_idle_guest_uses_next_to_no_processor(sandbox: Sandbox) -> None:
    time.sleep(1)
    before = sum(os.times()[:2])
    time.sleep(3)
    assert sum(os.times()[:2]) - before < 0.3


def test_asyncio_mirror_runs_commands(any_kernel: Any, image: Any, nothing_left: None) -> None:
    async def session() -> None:
        async with microvm.aio.Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND) as made:
            results = await asyncio.gather(*(made.run(f"echo {number}") for number in range(8)))
            assert [result.stdout for result in results] == [b"%d\n" % number for number in range(8)]
            process = await made.start(["cat"])
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.write(b"hello")
            await process.stdin.close()
            assert await process.stdout.read() == b"hello"
            assert await process.wait() == 0
            await made.files.write("/root/x", b"y")
            assert await made.files.read("/root/x") == b"y"
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await made.run(["sleep", "100"])
            assert (await made.run("echo alive")).stdout == b"alive\n"
            assert made.backend in ("kvm", "soft")

    asyncio.run(session())
