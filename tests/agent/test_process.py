"""Commands that are talked to while they run."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from microvm.agent.client import DEVNULL, AgentClient
from microvm.errors import ExecError

from .conftest import Agent, Connect
from .test_run import wait_until


def test_a_conversation(client: AgentClient) -> None:
    with client.start(["cat"]) as process:
        assert process.stdin
        assert process.stdout
        assert process.pid > 1
        assert process.poll() is None
        process.stdin.write(b"one\n")
        assert process.stdout.readline() == b"one\n"
        process.stdin.write(b"two\n")
        process.stdin.close()
        assert process.stdout.read() == b"two\n"
        assert process.wait(5) == 0
        assert process.returncode == 0


def test_communicate_like_subprocess(client: AgentClient) -> None:
    with client.start(["sh", "-c", "cat; echo e >&2; exit 2"]) as process:
        result = process.communicate(b"x" * 1_000_000)
    assert (len(result.stdout), result.stderr, result.returncode) == (1_000_000, b"e\n", 2)


def test_stdout_and_stderr_read_by_two_threads_do_not_wait_for_each_other(client: AgentClient) -> None:
    script = "for i in 1 2 3 4 5; do head -c 400000 /dev/zero >&2; head -c 400000 /dev/zero; done"
    with client.start(["sh", "-c", script], stdin=DEVNULL) as process:
        sizes: dict[str, int] = {}
        streams = {"out": process.stdout, "err": process.stderr}

        def read(name: str) -> None:
            stream = streams[name]
            assert stream
            sizes[name] = len(stream.read())

        threads = [threading.Thread(target=read, args=(name,)) for name in streams]
        for thread in threads:
            thread.start()
        assert process.wait(30) == 0
        for thread in threads:
            thread.join()
    assert sizes == {"out": 2_000_000, "err": 2_000_000}


def test_a_command_waits_for_a_host_that_does_not_read(client: AgentClient) -> None:
    with client.start(["sh", "-c", "head -c 10000000 /dev/zero; echo ended >&2"]) as process:
        assert process.stdout
        assert process.stderr
        time.sleep(0.2)
        assert process.poll() is None  # not even its end is known before the output is read
        assert len(process.stdout.read()) == 10_000_000
        assert process.stderr.read() == b"ended\n"
        assert process.wait() == 0


def test_the_end_of_a_stream_is_told_before_the_end_of_the_command(client: AgentClient) -> None:
    with client.start(["sh", "-c", "echo x; exec >&-; sleep 30"]) as process:
        assert process.stdout
        assert process.stdout.read() == b"x\n"
        assert process.returncode is None


def test_writing_to_a_command_that_has_closed_its_input_is_a_broken_pipe(client: AgentClient) -> None:
    with client.start(["sh", "-c", "exec <&-; echo closed; sleep 30"]) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"closed\n"
        with pytest.raises(BrokenPipeError):
            for _ in range(100):
                process.stdin.write(bytes(100_000))


def test_large_input_does_not_hold_up_a_signal(client: AgentClient) -> None:
    with client.start(["sleep", "30"]) as process:
        assert process.stdin
        writer = threading.Thread(target=_write_quietly, args=(process.stdin,))
        writer.start()
        time.sleep(0.1)
        process.kill()
        assert process.wait(5) == -9
        writer.join(5)
        assert not writer.is_alive()


def _write_quietly(stream: object) -> None:
    try:
        stream.write(bytes(10_000_000))  # type: ignore[attr-defined]
    except (BrokenPipeError, ExecError):
        pass


def test_signals_reach_the_process_group(client: AgentClient) -> None:
    with client.start(["sh", "-c", "trap 'echo got; exit 7' USR1; echo ready; while :; do sleep 0.05; done"]) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(5) == 7
    with client.start(["sleep", "30"]) as process:
        process.terminate()
        assert process.wait(5) == -15
        process.send_signal(9)  # after its end: nothing


def test_wait_times_out_and_the_command_runs_on(client: AgentClient) -> None:
    with client.start(["sleep", "30"]) as process:
        with pytest.raises(TimeoutError):
            process.wait(0.1)
        assert process.poll() is None


def test_the_guest_ends_a_command_in_time(client: AgentClient) -> None:
    with client.start(["sleep", "30"], timeout=0.2) as process:
        assert process.wait(5) == -9
        assert process.timed_out


def test_start_reports_what_cannot_be_started(client: AgentClient) -> None:
    with pytest.raises(ExecError, match="cannot run nope"):
        client.start(["nope"])


@pytest.mark.parametrize("escape", ["", "setsid "])
def test_hanging_up_ends_all_the_command_started(
    agent: Agent, client: AgentClient, request: pytest.FixtureRequest, escape: str
) -> None:
    if escape and "session" in request.node.name:
        pytest.skip("without control groups a new session gets away")
    process = client.start(["sh", "-c", f"{escape}sleep 1000 & sleep 1000 & echo up; wait"])
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.close()
    assert wait_until(lambda: not agent.children())


def test_a_host_that_dies_while_a_command_writes_ends_it(agent: Agent, connect: Connect) -> None:
    client = AgentClient(connect)
    process = client.start(["yes"])
    process.close()
    client.close()
    assert wait_until(lambda: not agent.children())


def test_terminal_has_its_size_and_is_resized(client: AgentClient) -> None:
    script = "stty size; trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.05; done"
    with client.start(["sh", "-c", script], pty=(30, 100)) as process:
        assert process.stdout
        assert process.stderr is None
        assert process.stdout.readline() == b"30 100\r\n"
        assert process.stdout.readline() == b"ready\r\n"
        process.resize(40, 120)
        assert process.stdout.readline() == b"40 120\r\n"
        assert process.wait(5) == 5


def test_terminal_controls_its_command(client: AgentClient) -> None:
    with client.start(["sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tty; cat"], pty=(24, 80)) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline().startswith(b"/dev/pts/")
        process.stdin.write(b"\x03")
        assert process.wait(5) == -2


def test_end_of_input_on_a_terminal(client: AgentClient) -> None:
    with client.start(["cat"], pty=(24, 80)) as process:
        assert process.stdin
        process.stdin.write(b"line\n")
        process.stdin.close()
        assert process.wait(5) == 0


def test_reading_from_a_dead_guest_is_an_error(tmp_path: os.PathLike[str]) -> None:
    from pathlib import Path

    from .conftest import running_agent

    with running_agent(Path(tmp_path)) as agent, AgentClient(agent.connect) as client:
        process = client.start(["sleep", "1000"])
        agent.process.kill()
        agent.process.wait()
        with pytest.raises(ExecError, match="connection to the guest was lost"):
            process.wait(5)
        process.close()
        os.kill(process.pid, 9)
        with pytest.raises(ExecError, match="cannot connect to the guest agent"):
            client.run(["true"])
