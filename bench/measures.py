"""What is measured. Each measure takes a Context and returns its Figures; ours and QEMU's runs alternate."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from microvm.images import images, kernels

from .guestside import GuestSide
from .machine import Child, Setup
from .ours import Ours
from .ours import cmdline as our_cmdline
from .peers.qemu import Qemu

PROGRAMS = ("alu", "sieve", "indirect", "double", "memcpy", "getppid", "faults", "fork", "pipe", "exec")
GOAL_MEAN, GOAL_WORST = 1.2, 2.2
GOAL_IDLE_PERCENT = 3.0
IDLE_S = 10.0
MEMORY_MIB = 256


@dataclass
class Figure:
    """One line of the table. ``goal`` is for ``ours``, or for ``ratio`` when ``goal_on_ratio``; less is better.

    ``inverse``: more is better (throughput); the ratio is QEMU's by ours then, so that below 1 is faster everywhere.
    """

    name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    goal: float | None = None
    goal_on_ratio: bool = False
    inverse: bool = False
    note: str = ""
    runs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        if not self.ours or not self.peer:
            return None
        return self.peer / self.ours if self.inverse else self.ours / self.peer

    @property
    def met(self) -> bool | None:
        value = self.ratio if self.goal_on_ratio else self.ours
        return None if self.goal is None or value is None else value <= self.goal

    @property
    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        return f"<= {self.goal:g}{' x QEMU' if self.goal_on_ratio else ' ' + self.unit}"

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


@dataclass
class Context:
    """What measures share."""

    guest: GuestSide
    rounds: int
    say: Callable[[str], None]
    ours: Ours = field(default_factory=Ours)

    def __post_init__(self) -> None:
        self.qemu = Qemu(self.guest.tsc_khz)

    def setup(self, **extra: object) -> Setup:
        return Setup(kernels.resolve("tuned").path, self.guest.initrd, memory_mib=MEMORY_MIB, **extra)  # type: ignore[arg-type]


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def compared(name: str, unit: str, ours: list[float], peer: list[float], **more: object) -> Figure:
    """A figure of two lists of runs."""
    return Figure(name, unit, median(ours), median(peer), runs={"ours": ours, "qemu": peer}, **more)  # type: ignore[arg-type]


# ---- power-on ----


def boot(context: Context) -> list[Figure]:
    figures = []
    for kind in ("tuned", "cloud"):
        kernel = kernels.resolve(kind)
        setup = Setup(kernel.path, context.guest.initrd, memory_mib=MEMORY_MIB)
        zipped = Setup(kernel.bzimage or kernel.path, context.guest.initrd, memory_mib=MEMORY_MIB)
        runs: dict[str, list[float]] = defaultdict(list)
        starts = {
            "fresh": lambda setup=setup: context.ours.start(setup),
            "qemu": lambda setup=setup: context.qemu.start(setup),
            "warm": None,
            "qemu plain": lambda setup=setup: context.qemu.start(setup, plain=True),
            "qemu bzImage": lambda zipped=zipped: context.qemu.start(zipped),
        }
        for _ in range(context.rounds):
            for name, start in starts.items():
                if start is None:
                    runs[name].append(warm_boot(setup))
                    continue
                with start() as child:
                    runs[name].append(child.watch("M")[0])
        best = min(("qemu", "qemu bzImage"), key=lambda name: statistics.median(runs[name]))
        plain = statistics.median(runs["qemu plain"])
        note = f"{best}; with our command line alone QEMU takes {plain:.2f} s"
        goal = {"goal": 1.0, "goal_on_ratio": True}
        figures.append(compared(f"boot {kind}, library", "s", runs["warm"], runs[best], note=note, **goal))
        figures.append(compared(f"boot {kind}, new process", "s", runs["fresh"], runs[best], **goal))
    return figures


def warm_boot(setup: Setup, backend: str = "soft") -> float:
    """Seconds from the call to the guest's first line in this process."""
    import microvm

    seen = threading.Event()
    started = time.perf_counter()
    config = microvm.MachineConfig(
        kernel=setup.kernel,
        initrds=[setup.initrd],
        cmdline=our_cmdline(setup),
        memory_mib=setup.memory_mib,
        vsock_cid=None,
        console=False,
        rng=False,
        balloon=False,
        backend=backend,
    )
    with microvm.MicroVM(config) as vm:
        vm.serial.on_output(lambda data: seen.set() if b"M" in data else None)
        vm.start()
        if not seen.wait(60):
            raise RuntimeError("the guest did not boot: " + vm.serial.tail(300).decode(errors="replace"))
        return time.perf_counter() - started


# ---- the whole command ----


def command(context: Context) -> list[Figure]:
    """`microvm run` from the shell beside QEMU with the same kernel and root file system and a trivial init."""
    kernel, image = kernels.resolve("tuned").path, images.resolve("python").path
    tool = shutil.which("microvm", path=os.path.dirname(sys.executable)) or shutil.which("microvm")
    front = [tool] if tool else [sys.executable, "-m", "microvm"]
    figures = []
    for name, argv in (("true", ["true"]), ("python3 -c 'print(1)'", ["python3", "-c", "print(1)"])):
        tasks = "root=" + "|".join(["/dev/vda", *argv])
        setup = Setup(kernel, context.guest.initrd, tasks, image, True, memory_mib=MEMORY_MIB)
        mine: list[float] = []
        peer: list[float] = []
        for _ in range(context.rounds):
            started = time.perf_counter()
            subprocess.run(
                [*front, "run", "--backend", "soft", "--", *argv], check=True, stdout=subprocess.DEVNULL, timeout=60
            )
            mine.append(time.perf_counter() - started)
            with context.qemu.start(setup) as child:
                _, results = child.watch("root")
                peer.append(time.perf_counter() - child.started)
                if results[-1].value:
                    raise RuntimeError(f"{name} failed in QEMU's guest: status {results[-1].value}")
        note = "QEMU: same kernel and root, an init that only mounts and execs, no agent"
        figures.append(compared(f"microvm run -- {name}", "s", mine, peer, note=note))
    return figures


# ---- guest programs ----


def programs(context: Context) -> list[Figure]:
    """Median over the runs of each run's median round by the guest's clock; the host's clock as a check."""
    rows: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in ("ours", "qemu", "drift")}
    for _ in range(context.rounds):
        for side, start in (("ours", context.ours.start), ("qemu", lambda s: context.qemu.start(s, lapic=True))):
            with start(context.setup(tasks="all")) as child:
                _, results = child.watch()
            for program in PROGRAMS:
                rounds = [r for r in results if r.name == program]
                rows[side][program].append(statistics.median(r.value for r in rounds) / 1e6)
                if sum(r.host_s for r in rounds) > 0.05:
                    drift = sum(r.value for r in rounds) / 1e9 / sum(r.host_s for r in rounds)
                    rows["drift"][side].append(drift)
    figures = [
        compared(f"program {p}", "ms", rows["ours"][p], rows["qemu"][p], goal=GOAL_WORST, goal_on_ratio=True)
        for p in PROGRAMS
    ]
    ratios = [figure.ratio for figure in figures if figure.ratio]
    mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
    clocks = ", ".join(f"{side} {statistics.median(rows['drift'][side]):.3f}" for side in ("ours", "qemu"))
    figures.append(
        Figure("programs, geometric mean", "x", mean, 1.0, GOAL_MEAN, True, note=f"guest clock by host clock: {clocks}")
    )
    return figures


# ---- devices ----


def block(context: Context) -> list[Figure]:
    names = ("block-seq-read", "block-seq-write", "block-rand-read", "block-rand-write")
    rows = _device_rows(context, lambda _: context.setup(tasks="block=/dev/vda", disk=context.guest.disk), names)
    return [
        compared(
            name.replace("-", " "),
            "MiB/s" if "seq" in name else "IOPS",
            rows["ours"][name],
            rows["qemu"][name],
            inverse=True,
            note="1 MiB requests, O_DIRECT, host page cache" if "seq" in name else "4 KiB, one at a time",
        )
        for name in names
    ]


def stream(context: Context) -> list[Figure]:
    socket = context.guest.folder / "stream"

    def setup(side: str) -> Setup:
        where = context.ours.stream if side == "ours" else context.qemu.stream
        return context.setup(tasks=f"stream={where}", stream=socket)

    rows = _device_rows(context, setup, ("stream-rtt", "stream-up", "stream-down"))
    note = "QEMU has no vsock under TCG: its virtio-serial port instead"
    trip = {side: [1e6 / rate for rate in rows[side]["stream-rtt"]] for side in rows}
    figures = [compared("vsock round trip", "us", trip["ours"], trip["qemu"], note=note)]
    for name, text in (("stream-up", "guest to host"), ("stream-down", "host to guest")):
        figures.append(
            compared(f"vsock {text}", "MiB/s", rows["ours"][name], rows["qemu"][name], inverse=True, note=note)
        )
    return figures


def console(context: Context) -> list[Figure]:
    rows = _device_rows(context, lambda _: context.setup(tasks="console=/dev/hvc0", console=True), ("console",))
    return [compared("console hvc0", "MiB/s", rows["ours"]["console"], rows["qemu"]["console"], inverse=True)]


def _device_rows(
    context: Context, setup: Callable[[str], Setup], names: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Per side and name: MiB or operations a second by the guest's clock."""
    rows: dict[str, dict[str, list[float]]] = {"ours": defaultdict(list), "qemu": defaultdict(list)}
    for _ in range(context.rounds):
        for side, start in (("ours", context.ours.start), ("qemu", context.qemu.start)):
            with start(setup(side)) as child:
                _, results = child.watch()
            for result in results:
                if result.name in names:
                    amount = result.amount / (1 << 20) if result.amount >= 1 << 20 else result.amount
                    rows[side][result.name].append(amount / (result.value / 1e9))
    return rows


# ---- what it costs to be there ----


def footprint(context: Context) -> list[Figure]:
    """Resident memory beside guest RAM, and the CPU an idle guest takes."""
    rows: dict[str, dict[str, list[float]]] = {"ours": defaultdict(list), "qemu": defaultdict(list)}
    rounds = min(context.rounds, 5)
    for _ in range(rounds):
        # The two idle side by side: neither does anything, and the wall time is halved.
        with (
            context.ours.start(context.setup(tasks="memory,idle")) as mine,
            context.qemu.start(context.setup(tasks="memory,idle"), lapic=True) as peer,
        ):
            sides: tuple[tuple[str, Child], ...] = (("ours", mine), ("qemu", peer))
            for side, child in sides:
                _, results = child.watch("memory")
                rows[side]["guest uses"].append((results[-1].amount - results[-1].value) / 1024)
            time.sleep(1.0)
            before = [(child.cpu_s(), time.perf_counter()) for _, child in sides]
            time.sleep(IDLE_S)
            for (side, child), (cpu, at) in zip(sides, before, strict=True):
                rows[side]["idle"].append((child.cpu_s() - cpu) / (time.perf_counter() - at) * 100)
                for key, value in zip(("ram", "rest", "private"), child.memory_mib(MEMORY_MIB), strict=True):
                    rows[side][key].append(value)

    def figure(name: str, unit: str, key: str, **more: object) -> Figure:
        return compared(name, unit, rows["ours"][key], rows["qemu"][key], **more)

    return [
        figure("host memory beside guest RAM", "MiB", "rest", note="resident, shared libraries included"),
        figure("  of which private", "MiB", "private"),
        figure("guest RAM resident", "MiB", "ram", note=f"of {MEMORY_MIB} MiB"),
        figure("guest's own use of RAM", "MiB", "guest uses", note="MemTotal - MemFree"),
        figure("idle guest", "% of a core", "idle", goal=GOAL_IDLE_PERCENT),
    ]


def start_up(context: Context) -> list[Figure]:
    """Import and version, beside an empty Python. The peer column is `python3 -c pass`."""
    python = sys.executable
    cases = {
        "pass": [python, "-c", "pass"],
        "import": [python, "-c", "import microvm"],
        "version": [python, "-m", "microvm", "--version"],
    }
    runs: dict[str, list[float]] = defaultdict(list)
    for _ in range(context.rounds * 4):
        for name, argv in cases.items():
            started = time.perf_counter()
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            runs[name].append((time.perf_counter() - started) * 1e3)
    times = subprocess.run(
        [python, "-X", "importtime", "-c", "import microvm"], check=True, capture_output=True, text=True
    )
    own = [line for line in times.stderr.splitlines() if line.endswith("| microvm")]
    cost = int(own[-1].split("|")[1]) / 1e3 if own else math.nan
    note = "beside `python3 -c pass`, not QEMU"
    return [
        compared(
            "python3 -c 'import microvm'", "ms", runs["import"], runs["pass"], note=f"{note}; importtime {cost:.1f} ms"
        ),
        compared("microvm --version", "ms", runs["version"], runs["pass"], note=note),
    ]


MEASURES: dict[str, Callable[[Context], list[Figure]]] = {
    "boot": boot,
    "command": command,
    "programs": programs,
    "block": block,
    "stream": stream,
    "console": console,
    "footprint": footprint,
    "start-up": start_up,
}
