"""Initial RAM disks: one or several, laid end to end as the kernel unpacks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import BootError
from ..memory import GuestMemory
from . import layout
from .image import Image

_ALIGN = 4  # the kernel looks for the next archive at the next multiple of four bytes


class Initrd(NamedTuple):
    """Where the initrds are."""

    gpa: int
    size: int


def load(
    memory: GuestMemory, images: Sequence[Image], kernel_start: int, kernel_end: int, ceiling: int
) -> Initrd | None:
    """Copy ``images`` one after another, as high below ``ceiling`` as whole pages allow.

    Where they do not fit above the kernel they go below it: in small guests most of the free memory may be there.
    Returns None where there is nothing to load. Raises BootError if they fit nowhere.
    """
    sizes = [(image.size + _ALIGN - 1) & -_ALIGN for image in images]
    total = sum(sizes)
    if not total:
        return None
    gaps = [(kernel_end, ceiling), (layout.HIGH_RAM, min(kernel_start, ceiling))]
    for floor, top in gaps:
        gpa = (top - total) & -0x1000
        if gpa >= floor:
            break
    else:
        room = max(top - floor for floor, top in gaps)
        raise BootError(
            f"the initrd does not fit into memory: it needs {_mib(total)} "
            f"and beside the kernel there are {_mib(max(room, 0))}"
        )
    position = gpa
    for image, size in zip(images, sizes, strict=True):
        if image.size:
            with memory.view(position, image.size) as view:
                image.read_into(0, view)
        position += size
    memory.written(gpa, total)
    return Initrd(gpa, total)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
