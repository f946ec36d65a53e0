"""The initramfs that starts the guest agent: as little as the kernel can start from."""

from __future__ import annotations

import os
from pathlib import Path

from microvm.images import cpio

# The agent mounts the kernel's file systems, the image and its overlay here before it changes root.
MOUNT_POINTS = ("dev", "proc", "sys", "run", "tmp", "lower", "upper", "newroot")


def agent_initrd(agent_binary_path: str | os.PathLike[str]) -> bytes:
    """An uncompressed cpio with the agent as /init. May be concatenated behind a kernel's ``modules.cpio``.

    Raises OSError when the agent cannot be read.
    """
    agent = Path(agent_binary_path).read_bytes()
    return cpio.pack(
        [
            *(cpio.directory(path) for path in MOUNT_POINTS),
            cpio.character_device("dev/console", 5, 1),
            cpio.character_device("dev/null", 1, 3, 0o666),
            cpio.file("init", agent, 0o755),
        ]
    )
