"""``microvm doctor``: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    import argparse

EXIT_UNAVAILABLE = 69


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what works on this machine and what to enable",
        description="Probe every backend by running a tiny guest on it, and look for kernels and images. "
        "The exit code is 69 if no backend can be used.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(render(report)))
    return 0 if report["auto"] else EXIT_UNAVAILABLE


def examine() -> dict[str, Any]:
    """Everything doctor knows, as JSON-ready data. Takes about a second: backends are probed by running a guest."""
    from ..errors import BackendUnavailable
    from ..hypervisor import select
    from ..images import kernels, rootfs
    from ..machine.config import host_memory_mib

    available = select.probe_all()
    try:
        auto = select.automatic().name
    except BackendUnavailable:
        auto = None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "host": f"{platform.system()} {platform.release()} {platform.machine()}",
        "memory_mib": host_memory_mib(),
        "auto": auto,
        "backends": [dataclasses.asdict(one) for one in available],
        "kernels": [{"name": one.name, "kind": one.kind, "path": str(one.path)} for one in kernels.list()],
        "images": [{"name": one.name, "path": str(one.path)} for one in rootfs.list()],
        "executable": sys.executable,
    }


def render(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    lines = [f"microvm {report['version']}, Python {report['python']}, {report['host']}", "", "backends"]
    for backend in report["backends"]:
        mark = "*" if backend["name"] == report["auto"] else " "
        lines.append(f"{mark} {backend['name']:5} {'usable' if backend['usable'] else 'no':7} {backend['reason']}")
        if backend["mips"]:
            speed = f"{backend['mips']:.0f} million instructions/s, {backend['exits_per_second']:,.0f} exits/s"
            lines.append(f"                {speed}")
        if backend["hint"] and not backend["usable"]:
            lines.append(f"                to enable: {backend['hint']}")
    if report["auto"]:
        lines.append(f"--backend auto takes {report['auto']}")
    else:
        lines.append("no backend can be used here")
    lines += ["", "kernels"]
    lines += [f"  {one['name']:32} {one['kind']}" for one in report["kernels"]] or [
        "  none yet: run `microvm kernel fetch cloud`, or `microvm kernel build` for the tuned one"
    ]
    lines += ["", "images"]
    lines += [f"  {one['name']:32} {one['path']}" for one in report["images"]] or [
        "  none yet: run `microvm image build python`"
    ]
    return lines
