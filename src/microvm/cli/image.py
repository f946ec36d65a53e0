"""``microvm image build | list | rm``: the root file systems that guests run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from microvm.cli.progress import Bar


def add_parser(subparsers: Any) -> None:
    """Add the command to the top-level parser."""
    parser = subparsers.add_parser("image", help="build, list and remove root file system images")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build an image (base or python), or pack an archive")
    what = build.add_mutually_exclusive_group()
    what.add_argument("image", nargs="?", metavar="NAME", help="base or python (default: python)")
    what.add_argument("--from", dest="archive", type=Path, metavar="ARCHIVE", help="pack a tar archive instead")
    build.add_argument("--name", default="", metavar="NAME", help="what to call the packed archive")
    build.add_argument("--force", action="store_true", help="build it even if it is there")
    actions.add_parser("list", help="list the images that are here")
    remove = actions.add_parser("rm", help="remove images by name")
    remove.add_argument("names", nargs="+", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    """Do what was asked; errors are raised."""
    from microvm.images import rootfs

    if args.action == "list":
        for image in rootfs.list():
            print(f"{image.name:20} {image.size / 1e6:8.1f} MB  {image.created:26} {image.path}")
        return 0
    if args.action == "rm":
        for name in args.names:
            rootfs.remove(name)
        return 0
    with Bar() as progress:
        if args.archive is not None:
            image = rootfs.build_from(args.archive, args.name, progress, force=args.force)
        else:
            image = rootfs.build(args.image or rootfs.DEFAULT, progress, force=args.force)
    print(image.path)
    return 0
