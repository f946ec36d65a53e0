"""What snapshots, forks and pools cost, beside QEMU restored from a file. Recorded, never asserted.

    PYTHONPATH=src python -m bench.snapshots [--image base] [--rounds 7]

Times are milliseconds, medians with the least of all rounds. QEMU boots the same kernel with the agent's initramfs and
says so on its serial port; `-incoming` continues that machine from a file. It has no agent, so its figure is the time to
the first byte that the restored guest prints, which is less than a command's result.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microvm import MicroVM, Pool, Sandbox
from microvm.agent.client import AgentClient
from microvm.agent.protocol import PORT
from microvm.images import cpio, kernels
from microvm.snapshot.tree import Tree


def show(what: str, values: list[float], unit: str = "ms") -> None:
    print(f"{what:58} {statistics.median(values):9.2f} {unit}   (least {min(values):.2f})", flush=True)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return (time.perf_counter() - begin) * 1e3, result


def rss_kib(pid: int) -> int:
    """Memory that is this process's alone."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Private_Clean", "Private_Dirty")))


def restores(image: str, rounds: int, where: Path) -> None:
    path = where / "s.mvs"
    with Sandbox(image, cold=True, isolated=False) as sandbox:
        show("cold boot to ready", [sandbox.boot_seconds * 1e3])
        show("snapshot of a booted machine, durable", [timed(lambda: sandbox.snapshot(path))[0]])
    print(f"{'  its size':58} {path.stat().st_blocks * 512 / 2**20:9.1f} MiB")
    build, first, command = [], [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        vm = MicroVM.restore(path)
        built = time.perf_counter()
        vm.start()
        running = threading.Event()
        vcpu = vm._machine.vcpus[0]
        while not vm._machine.partition.counters()["kicks"]:  # type: ignore[attr-defined]
            pass
        ran = time.perf_counter()
        del running, vcpu
        client = AgentClient(lambda vm=vm: vm.vsock.connect(PORT, 30))  # type: ignore[misc]
        client.run(["true"])
        done = time.perf_counter()
        build.append((built - begin) * 1e3)
        first.append((ran - begin) * 1e3)
        command.append((done - begin) * 1e3)
        client.close()
        vm.close()
    show("restore: file to machine", build)
    show("restore: file to first guest instruction", first)
    show("restore: file to a command's result, nothing warm", command)


def sandboxes(image: str, rounds: int) -> None:
    total, run, close = [], [], []
    took, first = timed(lambda: Sandbox(image).boot())
    show("Sandbox() booted, first of its kind in a program", [took])
    del first
    for _ in range(rounds):
        begin = time.perf_counter()
        sandbox = Sandbox(image)
        sandbox.boot()
        sandbox.run("echo")
        total.append((time.perf_counter() - begin) * 1e3)
        run.append(timed(lambda: sandbox.run("echo"))[0])
        close.append(timed(sandbox.close)[0])
    show("Sandbox() to the first command's result, warm", total)
    show("  one more command", run)
    show("  close", close)
    with Pool(3, image) as pool:
        while pool.ready < 3:
            time.sleep(0.01)
        taken = []
        for _ in range(3):
            took, sandbox = timed(pool.take)
            result, _ = timed(lambda box=sandbox: box.run("echo"))  # type: ignore[misc]
            taken.append(took + result)
            sandbox.close()
            time.sleep(0.2)
    show("Pool.take() to a command's result", taken)


def forks(image: str, rounds: int) -> None:
    with Sandbox(image) as sandbox:
        sandbox.run(["true"])
        pauses, ready = [], []
        for _ in range(rounds):
            took, children = timed(sandbox.fork)
            pauses.append(sandbox.fork_pause_seconds * 1e3)
            ready.append(took)
            children[0].close()
        show("fork of a running sandbox: it stands still for", pauses)
        show("fork of a running sandbox: until the copy is ready", ready)
        begin = time.perf_counter()
        boxes = [box for _ in range(2) for box in sandbox.fork(50) if isinstance(box, Sandbox)]
        made = time.perf_counter()
        sizes = [rss_kib(box._machine.pid) for box in boxes]  # type: ignore[union-attr]
        results: list[bytes] = []
        running = time.perf_counter()
        threads = [threading.Thread(target=lambda box=box: results.append(box.run("echo ok").stdout)) for box in boxes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ended = time.perf_counter()
        for box in boxes:
            box.close()
        assert results == [b"ok\n"] * len(boxes)
        seconds = made - begin + ended - running
        print(f"{f'{len(boxes)} forks, each running a command':58} {seconds:9.2f} s    (made in {made - begin:.2f})")
        print(f"{'  memory added by each, idle':58} {statistics.median(sizes) / 1024:9.2f} MiB")


def shell(image: str, rounds: int) -> None:
    def once(*words: str, **environment: str) -> float:
        command = [sys.executable, "-m", "microvm", "run", "--image", image, "--", *words]
        took, done = timed(lambda: subprocess.run(command, capture_output=True, env={**os.environ, **environment}))
        assert done.returncode == 0, done.stderr
        return took

    once("true")
    time.sleep(4)
    commands = [["true"]] + ([["python3", "-c", "print(1)"]] if image != "base" else [])
    for words in commands:
        show(f"shell: run -- {' '.join(words)}, resident zygote up", [once(*words) for _ in range(rounds)])
    with tempfile.TemporaryDirectory() as nowhere:
        os.chmod(nowhere, 0o700)
        alone = [once("true", MICROVM_NO_RESIDENT="1") for _ in range(rounds)]
        show("shell: run -- true, on its own, from the template", alone)


def checkpoints(image: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        os.environ["MICROVM_DATA"] = root
        for memory_mib in (128, 512, 1024):
            with Sandbox(image, memory_mib=memory_mib) as sandbox:
                base = sandbox.checkpoint(f"m{memory_mib}")
            for dirty_mib in (0, 16, 64):
                with base.restore() as sandbox:
                    sandbox.run(f"head -c {dirty_mib << 20} /dev/zero | tr '\\0' x > /tmp/x")
                    took, point = timed(lambda box=sandbox, d=dirty_mib: box.checkpoint(f"{base.name}-{d}"))  # type: ignore[misc]
                applied, again = timed(point.restore)
                again.close()
                size = Tree().find(point.name).size >> 10
                print(
                    f"checkpoint of {memory_mib:5} MiB with {dirty_mib:3} MiB written: "
                    f"create {took:7.1f} ms, apply {applied:6.1f} ms, {size:6} KiB",
                    flush=True,
                )


def qemu(rounds: int, where: Path) -> None:
    """QEMU 7.2's TCG with the same kernel: cold boot to user space, and from a migration file."""
    kernel = kernels.resolve(None)
    init = b"#!/bin/sh\n"
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        print("QEMU: no busybox on this host for its guest")
        return
    init = b"#!/bin/busybox sh\necho READY\nwhile true; do /bin/busybox sleep 0.001; echo TICK; done\n"
    ramdisk = where / "initrd"
    ramdisk.write_bytes(
        cpio.pack(
            [
                cpio.directory("bin"),
                cpio.directory("dev"),
                cpio.character_device("dev/console", 5, 1),
                cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
                cpio.file("init", init, 0o755),
            ]
        )
    )
    words = ["qemu-system-x86_64", "-M", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-m", "256", "-nodefaults"]
    words += ["-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel.path)]
    words += ["-initrd", str(ramdisk), "-append", "console=ttyS0 quiet mitigations=off nolapic_timer tsc=reliable"]
    monitor = where / "qmp"
    saved = where / "qemu.state"

    def start(*more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*words, *more], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)

    def until(process: subprocess.Popen[bytes], text: bytes) -> None:
        assert process.stdout is not None
        seen = b""
        while text not in seen:
            piece = os.read(process.stdout.fileno(), 4096)
            assert piece, seen
            seen += piece

    def end(process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

    cold, warm = [], []
    for _ in range(min(rounds, 3)):
        begin = time.perf_counter()
        process = start()
        until(process, b"READY")
        cold.append((time.perf_counter() - begin) * 1e3)
        end(process)
    show("QEMU: cold boot to user space", cold)
    process = start("-qmp", f"unix:{monitor},server,nowait")
    until(process, b"TICK")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(monitor))
        sock.sendall(b'{"execute":"qmp_capabilities"}{"execute":"stop"}')
        sock.sendall(b'{"execute":"migrate","arguments":{"uri":"exec:cat > %s"}}' % os.fsencode(saved))
        for _ in range(200):
            sock.sendall(b'{"execute":"query-migrate"}')
            if b'"completed"' in sock.recv(65536):
                break
            time.sleep(0.05)
    end(process)
    for _ in range(rounds):
        begin = time.perf_counter()
        process = start("-incoming", f"exec:cat {saved}", "-qmp", f"unix:{monitor},server,nowait")
        with socket.socket(socket.AF_UNIX) as sock:
            while sock.connect_ex(str(monitor)):
                time.sleep(0.001)
            sock.sendall(b'{"execute":"qmp_capabilities"}')
            while b'"inmigrate"' in _ask(sock):
                time.sleep(0.001)
            sock.sendall(b'{"execute":"cont"}')
            until(process, b"TICK")
        warm.append((time.perf_counter() - begin) * 1e3)
        end(process)
    show("QEMU: -incoming from a file to the guest's first output", warm)


def _ask(sock: socket.socket) -> bytes:
    sock.sendall(b'{"execute":"query-status"}')
    answer = b""
    while b'"status"' not in answer:
        answer += sock.recv(65536)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", default="base")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    with tempfile.TemporaryDirectory() as directory:
        restores(args.image, args.rounds, Path(directory))
        sandboxes(args.image, args.rounds)
        forks(args.image, args.rounds)
        shell(args.image, args.rounds)
        checkpoints(args.image)
        qemu(args.rounds, Path(directory))


if __name__ == "__main__":
    main()
