"""``microvm kernel build | fetch | list | rm | add``: the kernels that guests boot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from microvm.cli.progress import Bar


def add_parser(subparsers: Any) -> None:
    """Add the command to the top-level parser."""
    parser = subparsers.add_parser("kernel", help="build, fetch, list and remove guest kernels")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build the tuned kernel from Debian's source (minutes)")
    build.add_argument("--source", type=Path, metavar="ARCHIVE", help="the kernel source (default: linux-source-6.1)")
    build.add_argument("--jobs", "-j", type=int, default=0, metavar="N", help="compilers at once (default: one a CPU)")
    build.add_argument("--force", action="store_true", help="build it even if it is there")
    fetch = actions.add_parser("fetch", help="download a Debian kernel (not installed, only unpacked)")
    fetch.add_argument("kind", nargs="?", default="cloud", choices=["cloud", "generic"])
    fetch.add_argument("--force", action="store_true", help="download it even if it is there")
    add = actions.add_parser("add", help="unpack a Debian kernel package file")
    add.add_argument("archive", type=Path, metavar="FILE.deb")
    actions.add_parser("list", help="list the kernels that are here")
    remove = actions.add_parser("rm", help="remove kernels by name")
    remove.add_argument("names", nargs="+", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; errors are raised."""
    from microvm.images import kernels

    if args.action == "list":
        chosen = None
        for kernel in kernels.list():
            chosen = chosen or kernels.default().name
            mark = "*" if kernel.name == chosen else " "
            print(f"{mark} {kernel.name:32} {kernel.kind:8} {kernel.version:28} {kernel.size / 1e6:6.1f} MB")
        return 0
    if args.action == "rm":
        for name in args.names:
            kernels.remove(name)
        return 0
    with Bar() as progress:
        if args.action == "build":
            kernel = kernels.build(progress, source=args.source, jobs=args.jobs, force=args.force)
        elif args.action == "fetch":
            kernel = kernels.fetch(args.kind, progress, force=args.force)
        else:
            kernel = kernels.add_package(args.archive, progress)
    print(kernel.path)
    return 0
