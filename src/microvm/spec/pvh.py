"""The PVH boot ABI: what a kernel entered by its Xen note finds. [xen-pvh] docs/misc/pvh, arch-x86/hvm/start_info.h"""

from __future__ import annotations

from struct import Struct
from typing import Final

NOTE_NAME: Final = b"Xen\0"
NOTE_PHYS32_ENTRY: Final = 18  # XEN_ELFNOTE_PHYS32_ENTRY
START_MAGIC: Final = 0x336E_C578
START_VERSION: Final = 1

# magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr, memmap_entries, reserved
START_INFO: Final = Struct("<IIIIQQQQII")
MODULE: Final = Struct("<QQQQ")  # paddr, size, cmdline_paddr, reserved
MEMMAP_ENTRY: Final = Struct("<QQII")  # addr, size, type, reserved
assert START_INFO.size == 56
assert MODULE.size == 32
assert MEMMAP_ENTRY.size == 24
