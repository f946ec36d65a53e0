"""Round trip and throughput of the vsock device and its host sockets, with a fake driver as the guest. Prints JSON.

    PYTHONPATH=src python bench/vsock_micro.py [--seconds 1.0]

The guest runs in Python too and is not what is measured, but it shares the interpreter: figures are those of device,
I/O thread and sockets together with a guest of about the same cost. ``device_*`` leave the I/O thread out.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

from microvm.devices.vsock import Connection, Endpoint, Vsock
from microvm.machine.reactor import Reactor
from microvm.machine.vsock_host import VsockHost
from microvm.spec.virtio_vsock import HEADER, HEADER_SIZE, HOST_CID, QUEUE_RX, QUEUE_TX, Header, Op, Type
from microvm.testing.vsock import FakeVsockGuest

PORT = 5000
GUEST_PORT = 1000
MIB = 1 << 20


class Machine:
    def __init__(self, payload: int) -> None:
        self.reactor = Reactor(self.failed)
        self.device = Vsock()
        self.host = VsockHost(self.device, self.reactor)
        self.interrupt = threading.Event()
        self.guest = FakeVsockGuest(self.device, payload=payload, buffers=128, notifier=self.notify)
        self.guest.driver.irq.pulse = self.interrupt.set  # type: ignore[method-assign]
        self.reactor.start()
        self.guest.start()

    def failed(self, error: Exception) -> None:
        raise error

    def notify(self, index: int) -> None:
        self.reactor.call_soon_threadsafe(lambda: self.guest.driver.mmio.process(index))

    def connect(self) -> socket.socket:
        with self.host.listen(PORT) as listener:
            self.guest.packet(Op.REQUEST, GUEST_PORT, PORT, buf_alloc=1 << 31)
            stream = listener.accept(5)
            while not self.guest.receive():
                time.sleep(0.001)
            return stream

    def close(self) -> None:
        self.host.close()
        self.reactor.stop()


def round_trip(count: int) -> dict[str, float]:
    """The guest sends a byte, a thread of the host answers, the guest sees the answer."""
    machine = Machine(4096)
    stream = machine.connect()

    def echo() -> None:
        while data := stream.recv(100):
            stream.send(data)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        machine.guest.packet(Op.RW, GUEST_PORT, PORT, b"x", buf_alloc=1 << 31)
        while True:
            machine.interrupt.wait(1)
            machine.interrupt.clear()
            if any(header.op == Op.RW for header, _ in machine.guest.receive()):
                break
        times.append(time.perf_counter() - start)
    stream.shutdown(socket.SHUT_RDWR)
    machine.close()
    times.sort()
    return {"median_us": statistics.median(times) * 1e6, "p99_us": times[len(times) * 99 // 100] * 1e6}


def host_to_guest(payload: int, seconds: float) -> float:
    """MiB/s from a socket of the host into receive buffers of ``payload`` bytes; they are given back at once."""
    machine = Machine(payload)
    machine.guest.refill = False
    stream = machine.connect()
    chunk = bytes(MIB)
    running = True

    def send() -> None:
        try:
            while running:
                stream.send(chunk)
        except OSError:
            pass

    threading.Thread(target=send, daemon=True).start()
    total = 0
    driver = machine.guest.driver
    ring = driver.ring(QUEUE_RX)
    start = time.perf_counter()
    acknowledged = 0
    while (spent := time.perf_counter() - start) < seconds:
        machine.interrupt.wait(0.1)
        machine.interrupt.clear()
        memory = machine.guest.memory
        while ring.used_index != memory.load_u16(ring.used_gpa + 2):
            slot = ring.used_gpa + 4 + 8 * (ring.used_index % ring.size)
            head, written = memory.load_u32(slot), memory.load_u32(slot + 4)
            ring.used_index = (ring.used_index + 1) & 0xFFFF
            total += written - HEADER_SIZE
            driver.offer(QUEUE_RX, head)
        if driver.wants_notify(QUEUE_RX):
            driver.notify(QUEUE_RX)
        if total - acknowledged > 1 << 28:
            acknowledged = total
            machine.guest.packet(Op.CREDIT_UPDATE, GUEST_PORT, PORT, buf_alloc=1 << 31, fwd_cnt=total & 0xFFFF_FFFF)
    running = False
    machine.close()
    return total / spent / MIB


def guest_to_host(size: int, seconds: float) -> float:
    """MiB/s from packets of ``size`` bytes to a reader on the host; the guest keeps to its credit."""
    machine = Machine(4096)
    stream = machine.connect()
    received = 0

    def read() -> None:
        nonlocal received
        buffer = bytearray(MIB)
        try:
            while count := stream.recv_into(buffer):
                received += count
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()
    guest, driver = machine.guest, machine.guest.driver
    packet = HEADER.pack(*Header(3, HOST_CID, GUEST_PORT, PORT, size, Type.STREAM, Op.RW, 0, 1 << 31, 0)) + bytes(size)
    gpa = 0x10_0000
    guest.memory.write(gpa, packet)
    sent = forwarded = 0
    start = time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        driver.collect(QUEUE_TX)
        queued = False
        while sent - forwarded + size <= 1 << 18 and driver.ring(QUEUE_TX).free:
            driver.add_segments(QUEUE_TX, [(gpa, len(packet), 0)])
            sent += size
            queued = True
        if queued and driver.wants_notify(QUEUE_TX):
            driver.notify(QUEUE_TX)
        machine.interrupt.wait(0.1)
        machine.interrupt.clear()
        for header, _ in guest.receive():
            forwarded += (header.fwd_cnt - forwarded) & 0xFFFF_FFFF
    result = received / spent / MIB
    machine.close()
    return result


class Sink:
    """Takes everything; as a source, has everything."""

    def __init__(self) -> None:
        self.taken = 0

    def on_connected(self) -> None: ...
    def on_writable(self) -> None: ...
    def on_shutdown(self, flags: int) -> None: ...
    def on_closed(self, reset: bool) -> None: ...

    def on_data(self, views: list[memoryview]) -> int:
        count = sum(map(len, views))
        self.taken += count
        return count


def device_alone(prepare: Callable[[FakeVsockGuest, Connection], Callable[[], int]], payload: int) -> float:
    """Microseconds the device spends on one packet, without copying any payload."""
    sink = Sink()
    connections: list[Connection] = []

    def accept(connection: Connection) -> Endpoint:
        connections.append(connection)
        return sink

    notified: list[int] = []  # and forgotten: the queues are served when the clock runs
    guest = FakeVsockGuest(Vsock(accept=accept), payload=payload, buffers=128, notifier=notified.append).start()
    guest.packet(Op.REQUEST, GUEST_PORT, PORT, buf_alloc=1 << 31)
    guest.device.process(QUEUE_TX)
    guest.receive()
    step = prepare(guest, connections[0])
    return statistics.median(step() / 1000 for _ in range(50))


def receive_cost(guest: FakeVsockGuest, connection: Connection) -> Callable[[], int]:
    def fill(views: list[memoryview]) -> int:
        return sum(map(len, views))

    def step() -> int:
        before = connection.state.tx_cnt
        start = time.perf_counter_ns()
        with guest.device.batch():
            connection.fill(fill)
        spent = time.perf_counter_ns() - start
        packets = len(guest.receive())
        guest.device.process(QUEUE_RX)
        sent = (connection.state.tx_cnt - before) & 0xFFFF_FFFF
        guest.packet(Op.CREDIT_UPDATE, GUEST_PORT, PORT, buf_alloc=1 << 31, fwd_cnt=connection.state.tx_cnt)
        guest.device.process(QUEUE_TX)
        assert sent
        return spent // packets

    return step


def transmit_cost(guest: FakeVsockGuest, connection: Connection) -> Callable[[], int]:
    def step() -> int:
        for _ in range(32):
            guest.packet(Op.RW, GUEST_PORT, PORT, bytes(1024), notify=False, buf_alloc=1 << 31)
        start = time.perf_counter_ns()
        guest.device.process(QUEUE_TX)
        spent = time.perf_counter_ns() - start
        guest.receive()
        return spent // 32

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0)
    seconds = parser.parse_args().seconds
    sys.setswitchinterval(50e-6)  # as a machine does
    results = {
        "python": platform.python_version(),
        "round_trip": round_trip(int(2000 * seconds)),
        "host_to_guest_mib_s": {str(size): host_to_guest(size, seconds) for size in (4096, 65536)},
        "guest_to_host_mib_s": {str(size): guest_to_host(size, seconds) for size in (4096, 65536)},
        "device_us_per_packet": {
            "receive_4096": device_alone(receive_cost, 4096),
            "transmit_1024": device_alone(transmit_cost, 4096),
        },
    }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
