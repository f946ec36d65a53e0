"""Disk images as devices see them."""

from .raw import RawDisk

__all__ = ["RawDisk"]
