"""Putting a kernel into guest memory so that it starts: loaders, tables, command line."""

from .acpi import EventDevice
from .bzimage import extract_vmlinux
from .image import ImageSource
from .layout import VirtioSlot, virtio_slot
from .loader import BootState, load

__all__ = ["BootState", "EventDevice", "ImageSource", "VirtioSlot", "extract_vmlinux", "load", "virtio_slot"]
