"""What the software CPU says of itself: the engine's own answers, cut and completed to the machine model.

The TSC counts nanoseconds of guest time, whatever the host; leaf 0x15 says so (25 MHz x 40), and the local APIC timer
runs at the crystal's rate, because that is where Linux takes it from. With leaf 0x15, TSC-deadline, ARAT and the
KVM clock no guest calibrates against a timer (design/guest.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TSC_HZ: Final = 1_000_000_000
CRYSTAL_HZ: Final = 25_000_000

ANY: Final = 0xFFFF_FFFF
Leaf = tuple[int, int, int, int, int, int]

_VENDOR: Final = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # GenuineIntel: EBX, ECX, EDX
_KVM: Final = (0x4B4D_564B, 0x564B_4D56, 0x4D)  # KVMKVMKVM
_MAX_LEAF: Final = 0x16
_MAX_EXTENDED: Final = 0x8000_0008

_ECX1_HIDDEN: Final = (1 << 2) | (1 << 3) | (1 << 5) | (1 << 21) | (1 << 27)  # DTES64 MONITOR VMX x2APIC OSXSAVE
_ECX1_ADDED: Final = (1 << 24) | (1 << 31)  # TSC deadline, hypervisor
_EDX1_ADDED: Final = 1 << 9  # APIC
_EBX7_HIDDEN: Final = 1 << 9  # ERMS: without it Linux clears pages in a third fewer instructions here
_EDX7_HIDDEN: Final = 1 << 4  # FSRM
_ARAT: Final = 1 << 2
_INVARIANT_TSC: Final = 1 << 8
_ECX80000001_HIDDEN: Final = 1 << 2  # SVM: its hidden state is ours
_KVM_FEATURES: Final = (1 << 3) | (1 << 24)  # clock source 2, stable


def leaves(engine: Callable[[int, int], tuple[int, int, int, int]]) -> list[Leaf]:
    """The table for one partition: (leaf, subleaf, eax, ebx, ecx, edx); what is not in it reads as zero.

    ``engine(leaf, subleaf)`` is what the engine itself would answer. APIC id and OSXSAVE are filled in at run time.
    """
    table: list[Leaf] = [(0, ANY, _MAX_LEAF, _VENDOR[0], _VENDOR[1], _VENDOR[2])]
    eax, ebx, ecx, edx = engine(1, 0)
    table.append((1, ANY, eax, ebx & 0x00FF_FFFF, (ecx & ~_ECX1_HIDDEN) | _ECX1_ADDED, edx | _EDX1_ADDED))
    table.append((2, ANY, *engine(2, 0)))
    table += [(4, subleaf, *engine(4, subleaf)) for subleaf in range(4)]
    table.append((6, ANY, _ARAT, 0, 0, 0))
    eax, ebx, ecx, edx = engine(7, 0)
    table.append((7, 0, 0, ebx & ~_EBX7_HIDDEN, ecx, edx & ~_EDX7_HIDDEN))
    table += [(0xD, subleaf, *engine(0xD, subleaf)) for subleaf in range(3)]
    table.append((0x15, ANY, 1, TSC_HZ // CRYSTAL_HZ, CRYSTAL_HZ, 0))
    table.append((0x16, ANY, TSC_HZ // 1_000_000, TSC_HZ // 1_000_000, 100, 0))
    table.append((0x4000_0000, ANY, 0x4000_0001, *_KVM))
    table.append((0x4000_0001, ANY, _KVM_FEATURES, 0, 0, 0))
    table.append((0x8000_0000, ANY, _MAX_EXTENDED, *_VENDOR))
    eax, ebx, ecx, edx = engine(0x8000_0001, 0)
    table.append((0x8000_0001, ANY, eax, ebx, ecx & ~_ECX80000001_HIDDEN, edx))
    table += [(leaf, ANY, *_brand(leaf - 0x8000_0002)) for leaf in range(0x8000_0002, 0x8000_0005)]
    table += [(leaf, ANY, *engine(leaf, 0)) for leaf in (0x8000_0005, 0x8000_0006)]
    table.append((0x8000_0007, ANY, 0, 0, 0, _INVARIANT_TSC))
    table.append((0x8000_0008, ANY, *engine(0x8000_0008, 0)))
    return table


def _brand(part: int) -> tuple[int, int, int, int]:
    text = b"microvm software CPU".ljust(48, b"\0")[16 * part : 16 * part + 16]
    words = tuple(int.from_bytes(text[4 * i : 4 * i + 4], "little") for i in range(4))
    return words[0], words[1], words[2], words[3]
