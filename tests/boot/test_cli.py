"""The command line on real machines: exit codes, streams, signals, and one sentence for everything that is wrong."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm.testing.hypervisor import tiny_kernel

from .conftest import BACKEND

pytestmark = [pytest.mark.boots, pytest.mark.timeout(180)]

Run = Callable[..., subprocess.CompletedProcess[bytes]]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "microvm", *arguments]


@pytest.fixture(scope="module")
def run_options(any_kernel: Any, image: Any) -> list[str]:
    return ["--backend", BACKEND, "--kernel", any_kernel.name, "--image", str(image.path)]


@pytest.fixture
def microvm_run(run_options: list[str]) -> Run:
    def run(*arguments: str, options: tuple[str, ...] = (), **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        kwargs.setdefault("stdin", subprocess.DEVNULL if "input" not in kwargs else None)
        if "input" in kwargs:
            del kwargs["stdin"]
        words = command("run", *run_options, *options, "--", *arguments)
        return subprocess.run(words, capture_output=True, timeout=120, check=False, **kwargs)

    return run


@pytest.fixture
def microvm_boot() -> Run:
    def boot(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
        words = command("boot", "--backend", BACKEND, *arguments)
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)

    return boot


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one line on standard error."""
    text = done.stderr.decode()
    assert re.fullmatch(r"microvm: [^\n]+\n", text), text
    assert "Traceback" not in text
    return text


def test_output_and_exit_code_are_the_commands(microvm_run: Run) -> None:
    done = microvm_run("python3", "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_signal_is_128_and_its_number(microvm_run: Run) -> None:
    assert microvm_run("sh", "-c", "kill -9 $$").returncode == 137


def test_input_is_passed_on(microvm_run: Run) -> None:
    data = os.urandom(300_000)
    done = microvm_run("cat", input=data)
    assert done.stdout == data


def test_closed_input_is_no_error(microvm_run: Run) -> None:
    assert microvm_run("cat", preexec_fn=lambda: os.close(0)).returncode == 0


@pytest.mark.parametrize(("name", "code"), [("/no/such", 127), ("/etc/passwd", 126)])
def test_command_that_cannot_run_is_one_sentence(microvm_run: Run, name: str, code: int) -> None:
    done = microvm_run(name)
    assert done.returncode == code
    assert name in sentence(done)


def test_timeout_is_124(microvm_run: Run) -> None:
    done = microvm_run("sleep", "100", options=("--timeout", "1"))
    assert done.returncode == 124
    assert "sleep did not end within 1 s" in sentence(done)


def test_environment_directory_and_user(microvm_run: Run) -> None:
    options = ("--env", "A=1", "--workdir", "/tmp", "--user", "nobody")
    done = microvm_run("sh", "-c", "echo $A $PWD $(id -un)", options=options)
    assert done.stdout == b"1 /tmp nobody\n"


def test_reader_that_leaves_ends_the_command_like_a_local_one(run_options: list[str]) -> None:
    words = command("run", *run_options, "--", "yes")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


def test_interrupt_goes_to_the_command(run_options: list[str]) -> None:
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    words = command("run", *run_options, "--", "sh", "-c", script)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(60) == 9


def test_three_interrupts_end_even_a_deaf_command(run_options: list[str]) -> None:
    script = "trap '' INT; echo ready; while :; do sleep 0.1; done"
    words = command("run", *run_options, "--", "sh", "-c", script)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"ready\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


def test_interrupt_while_booting_leaves_quietly(run_options: list[str]) -> None:
    words = command("run", *run_options, "--", "true")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, 0)
        assert b"Traceback" not in process.stderr.read()


def test_terminal_is_given_resized_and_restored(run_options: list[str]) -> None:
    import fcntl
    import struct
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("<4H", 31, 97, 0, 0))
    before = termios.tcgetattr(slave)
    script = "stty size; test -t 0 && echo terminal; read line; echo got-$line; stty size; exit 5"
    words = command("run", "-t", *run_options, "--", "sh", "-c", script)
    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    try:
        seen = b""
        while b"terminal" not in seen:
            seen += os.read(master, 4096)
        assert b"31 97" in seen
        assert termios.tcgetattr(slave) != before
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("<4H", 25, 60, 0, 0))
        process.send_signal(signal.SIGWINCH)
        time.sleep(0.5)
        os.write(master, b"hello\r")
        while b"25 60" not in seen:
            seen += os.read(master, 4096)
        assert b"got-hello" in seen
        assert process.wait(60) == 5
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def test_boot_shows_the_console_and_ends_with_the_guest(microvm_boot: Run, any_kernel: Any) -> None:
    done = microvm_boot("--kernel", any_kernel.name)
    assert done.returncode == 0
    assert b"Linux version" in done.stdout
    assert b"Kernel panic" in done.stdout  # there is no root: it panics, and resets as it was told
    assert done.stderr == b""


def test_boot_by_virtio_console_shows_output(microvm_boot: Run, kernel: Callable[[str], Any]) -> None:
    done = microvm_boot("--kernel", kernel("tuned").name, "--console", "hvc")
    assert done.returncode == 0
    assert b"Kernel panic" in done.stdout


def test_reader_of_the_console_may_leave(any_kernel: Any) -> None:
    words = command("boot", "--backend", BACKEND, "--kernel", any_kernel.name)
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


class TestBadInput:
    """Nothing that is wrong with what was given ends in more than a sentence, or later than at once."""

    @pytest.fixture
    def bad(self, microvm_boot: Run, tmp_path: Path) -> Callable[..., str]:
        good = tmp_path / "good"
        good.write_bytes(tiny_kernel(b"\xeb\xfe"))

        def check(*arguments: str, kernel: Path | None = None, code: int = 2) -> str:
            done = microvm_boot("--kernel", str(kernel or good), *arguments, timeout=30)
            assert done.returncode == code, done.stderr
            assert done.stdout == b""
            return sentence(done)

        return check

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(b"", id="empty"),
            pytest.param(b"x", id="one byte"),
            pytest.param(b"#!/bin/sh\necho hello\n" * 100, id="script"),
            pytest.param(bytes(100_000), id="zeroes"),
            pytest.param(b"\x7fELF" + bytes(1000), id="nearly an ELF file"),
            pytest.param(bytes(510) + b"\x55\xaa" + b"HdrS" + bytes(1000), id="nearly a bzImage"),
        ],
    )
    def test_not_a_kernel(self, bad: Callable[..., str], tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(content)
        assert str(path) in bad(kernel=path)

    @pytest.mark.parametrize("part", ["vmlinux", "bzimage"])
    @pytest.mark.parametrize("fraction", [0.0001, 0.5, 0.999])
    def test_truncated_kernel(
        self, bad: Callable[..., str], tmp_path: Path, any_kernel: Any, part: str, fraction: float
    ) -> None:
        source = any_kernel.path if part == "vmlinux" else any_kernel.bzimage
        data = source.read_bytes()
        path = tmp_path / part
        path.write_bytes(data[: int(len(data) * fraction)])
        assert str(path) in bad(kernel=path)

    def test_program_as_kernel(self, bad: Callable[..., str]) -> None:
        bad(kernel=Path(sys.executable).resolve())

    def test_directory_as_kernel(self, bad: Callable[..., str], tmp_path: Path) -> None:
        bad(kernel=tmp_path)

    def test_missing_kernel(self, bad: Callable[..., str], tmp_path: Path) -> None:
        assert "no such file" in bad(kernel=tmp_path / "none")

    def test_initrd_larger_than_memory(self, bad: Callable[..., str], tmp_path: Path) -> None:
        path = tmp_path / "initrd"
        with open(path, "wb") as file:
            file.truncate(300 << 20)
        assert "does not fit" in bad("--initrd", str(path), "--memory", "128")

    def test_missing_initrd(self, bad: Callable[..., str], tmp_path: Path) -> None:
        assert "no such file" in bad("--initrd", str(tmp_path / "none"))

    @pytest.mark.parametrize("memory", ["0", "-1", "63", "65", "abc", "1e9", "99999999999", "400G", ""])
    def test_impossible_memory(self, bad: Callable[..., str], memory: str) -> None:
        assert "memory" in bad(f"--memory={memory}")

    @pytest.mark.parametrize("cpus", ["0", "-1", "33", "many"])
    def test_impossible_cpus(self, bad: Callable[..., str], cpus: str) -> None:
        assert "cpus" in bad(f"--cpus={cpus}")

    def test_unknown_backend(self, bad: Callable[..., str]) -> None:
        assert "one of auto" in bad("--backend", "abacus")

    def test_missing_disk(self, bad: Callable[..., str], tmp_path: Path) -> None:
        assert "no such file" in bad("--disk", str(tmp_path / "none"))

    def test_directory_as_disk(self, bad: Callable[..., str], tmp_path: Path) -> None:
        assert "is a directory" in bad("--disk", str(tmp_path))

    @pytest.mark.parametrize("size", [0, 1, 513, 1_000_001])
    def test_disk_of_odd_size(self, bad: Callable[..., str], tmp_path: Path, size: int) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(size))
        assert "disk" in bad("--disk", str(path))
        assert path.stat().st_size == size

    def test_too_many_disks(self, bad: Callable[..., str], scratch_disk: Path) -> None:
        assert "at most 8" in bad(*["--disk", f"{scratch_disk},ro"] * 9)

    def test_endless_command_line(self, bad: Callable[..., str]) -> None:
        assert "command line" in bad("--append", "x" * 5000)

    @pytest.mark.parametrize("arguments", [["--image", "no-such-image"], ["--kernel", "no-such-kernel"]])
    def test_unknown_image_or_kernel(self, arguments: list[str]) -> None:
        done = subprocess.run(command("run", *arguments, "--", "true"), capture_output=True, timeout=60, check=False)
        assert done.returncode == 2
        assert arguments[1] in sentence(done)

    def test_image_that_is_no_file_system(self, any_kernel: Any, tmp_path: Path) -> None:
        path = tmp_path / "image.erofs"
        path.write_bytes(b"garbage!" * 8192)
        words = command("run", "--backend", BACKEND, "--kernel", any_kernel.name, "--image", str(path), "--", "true")
        done = subprocess.run(words, capture_output=True, timeout=120, check=False)
        assert done.returncode in (1, 2)
        sentence(done)

    def test_nothing_to_run(self) -> None:
        done = subprocess.run(command("run"), capture_output=True, timeout=60, check=False)
        assert done.returncode == 2
        assert "no command to run" in sentence(done)
