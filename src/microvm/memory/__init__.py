"""Guest-physical memory as the host sees it."""

from .guest import GuestMemory, MemoryRegion

__all__ = ["GuestMemory", "MemoryRegion"]
