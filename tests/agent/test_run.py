"""Commands that run to their end."""

from __future__ import annotations

import os
import threading
import time

import pytest

from microvm.agent.client import DEVNULL, STDOUT, AgentClient
from microvm.errors import CommandFailed, ConfigError, ExecError, ExecTimeout

from .conftest import Agent


def test_output_error_and_exit_code_come_apart(client: AgentClient) -> None:
    result = client.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert result.duration_s > 0
    assert result.maxrss_kib > 0


def test_a_signal_is_a_negative_code(client: AgentClient) -> None:
    assert client.run(["sh", "-c", "kill -TERM $$"]).returncode == -15


def test_stderr_can_be_merged_or_dropped(client: AgentClient) -> None:
    command = ["sh", "-c", "echo a; echo b >&2; echo c"]
    merged = client.run(command, stderr=STDOUT)
    assert (merged.stdout, merged.stderr) == (b"a\nb\nc\n", b"")
    assert client.run(command, stdout=DEVNULL).stdout == b""


def test_check_raises_with_the_output(client: AgentClient) -> None:
    with pytest.raises(CommandFailed, match="sh exited with code 4") as raised:
        client.run(["sh", "-c", "echo why >&2; exit 4"], check=True)
    assert (raised.value.returncode, raised.value.stderr) == (4, b"why\n")


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 5_000_000])
def test_input_of_any_size_comes_back(client: AgentClient, size: int) -> None:
    data = os.urandom(size)
    assert client.run(["cat"], input=data).stdout == data


def test_input_that_nobody_reads_is_no_error(client: AgentClient) -> None:
    assert client.run(["true"], input=bytes(3_000_000)).returncode == 0


def test_both_streams_can_be_large(client: AgentClient) -> None:
    result = client.run(["sh", "-c", "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2"])
    assert (len(result.stdout), len(result.stderr)) == (3_000_000, 3_000_000)


def test_environment_adds_or_replaces(client: AgentClient) -> None:
    added = client.run(["sh", "-c", "echo $A:$HOME"], env={"A": "1"})
    assert added.stdout == b"1:/root\n"
    assert client.run(["sh", "-c", "echo $HOME"], env={"HOME": "/tmp"}).stdout == b"/tmp\n"
    replaced = client.run(["/usr/bin/env"], env={"B": "two words=\n"}, replace_env=True)
    assert replaced.stdout == b"B=two words=\n\n"


def test_the_command_is_found_on_its_own_path(client: AgentClient) -> None:
    with pytest.raises(ExecError):
        client.run(["ls"], env={"PATH": "/nowhere"})


def test_directory_of_work(client: AgentClient) -> None:
    assert client.run(["pwd"], cwd="/usr").stdout == b"/usr\n"
    assert client.run(["pwd"]).stdout == b"/\n"
    with pytest.raises(ExecError, match="cwd: no such file"):
        client.run(["pwd"], cwd="/nowhere")


def test_missing_and_forbidden_commands_are_told_apart(client: AgentClient) -> None:
    with pytest.raises(ExecError, match="cannot run nope: no such file") as raised:
        client.run(["nope"])
    assert (raised.value.code, raised.value.exit_code) == (2, 127)
    with pytest.raises(ExecError, match="permission denied") as raised:
        client.run(["/etc/passwd"])
    assert (raised.value.code, raised.value.exit_code) == (13, 126)


def test_user_by_name_and_number(client: AgentClient) -> None:
    script = ["sh", "-c", "id -u; id -g; id -G; echo $HOME $USER"]
    daemon = client.run(script, user="daemon").stdout.decode().split("\n")
    assert daemon[0] == "1"
    assert "daemon" in daemon[3]
    assert client.run(script, user="12345:23").stdout.decode().split("\n")[:3] == ["12345", "23", "23"]
    with pytest.raises(ExecError, match="no such user"):
        client.run(["true"], user="nobody-of-that-name")


def test_a_user_can_open_its_standard_output(client: AgentClient) -> None:
    assert client.run(["sh", "-c", "echo x > /dev/stdout"], user="daemon").stdout == b"x\n"


def test_supplementary_groups_are_the_users(client: AgentClient) -> None:
    groups = client.run(["id", "-G"], user="daemon").stdout.split()
    assert groups == [b"1"]
    assert client.run(["sh", "-c", "grep Groups: /proc/self/status"], user="7:8").stdout.split() == [b"Groups:", b"8"]


def test_rlimits_and_no_new_privs(client: AgentClient) -> None:
    result = client.run(["sh", "-c", "ulimit -n"], rlimits={7: (99, 100)})
    assert result.stdout == b"99\n"
    status = client.run(["grep", "NoNewPrivs", "/proc/self/status"], no_new_privs=True)
    assert status.stdout.split()[1] == b"1"


def test_signals_start_at_their_defaults(client: AgentClient) -> None:
    status = client.run(["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"]).stdout.decode()
    assert {line.split()[1] for line in status.splitlines()} == {"0" * 16}


def test_nothing_of_the_agent_is_open_in_a_command(client: AgentClient) -> None:
    names = client.run(["ls", "/proc/self/fd"]).stdout.split()
    assert sorted(names) == [b"0", b"1", b"2", b"3"]  # 3 is the directory that ls reads


def test_timeout_ends_the_command_and_keeps_its_output(client: AgentClient) -> None:
    begin = time.monotonic()
    with pytest.raises(ExecTimeout, match="sh did not end within 0.3 s") as raised:
        client.run(["sh", "-c", "echo so far; sleep 60"], timeout=0.3)
    assert raised.value.stdout == b"so far\n"
    assert time.monotonic() - begin < 5


def test_output_beyond_the_cap_is_an_error_and_ends_the_command(agent: Agent, client: AgentClient) -> None:
    with pytest.raises(ExecError, match="yes wrote more than the 1000000 bytes allowed"):
        client.run(["yes"], max_output=1_000_000)
    assert wait_until(lambda: not agent.children())


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        ("ls", {}),
        (["a\0b"], {}),
        (["x" * (1 << 20)], {}),
        (["ls"], {"env": {"A=B": "c"}}),
        (["ls"], {"timeout": -1}),
        (["ls"], {"stdout": 7}),
    ],
)
def test_impossible_requests_are_config_errors(client: AgentClient, argv: list[str], options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        client.run(argv, **options)  # type: ignore[arg-type]


def test_what_a_command_leaves_is_ended_with_it(agent: Agent, client: AgentClient) -> None:
    client.run(["sh", "-c", "sleep 1000 & sleep 1000 & (sleep 1000 &) & exit 0"])
    assert wait_until(lambda: not agent.children())


def test_what_a_command_leaves_can_live_on(agent: Agent, client: AgentClient) -> None:
    result = client.run(["sh", "-c", "sleep 1000 & echo $!"], leave_running=True)
    pid = int(result.stdout)
    assert os.path.exists(f"/proc/{pid}")
    os.kill(pid, 9)
    assert wait_until(lambda: not agent.children())


def test_commands_run_side_by_side(client: AgentClient) -> None:
    outputs: list[bytes] = []
    command = ["sh", "-c", "sleep 0.2; echo done"]
    threads = [threading.Thread(target=lambda: outputs.append(client.run(command).stdout)) for _ in range(10)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == [b"done\n"] * 10
    assert time.monotonic() - begin < 1.9


def test_a_thousand_commands_leave_nothing_open(agent: Agent, client: AgentClient) -> None:
    client.run(["true"])
    before = agent.open_files()
    for _ in range(1000):
        client.run(["true"])
    assert len(agent.open_files()) == len(before)
    assert agent.children() == []


def wait_until(condition: object, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
