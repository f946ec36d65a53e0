"""x86-64 processor constants: control registers, segment attributes, page table bits, MSI fields. [SDM] 3A."""

from __future__ import annotations

from typing import Final

CR0_PE: Final = 1 << 0
CR0_ET: Final = 1 << 4
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PAE: Final = 1 << 5
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
RFLAGS_RESERVED: Final = 1 << 1  # always one

# Segment attributes in Hyper-V's layout (hypervisor/base.py, Segment): type, S, DPL, P, then AVL, L, D/B, G.
SEG_CODE: Final = 0xB  # execute, read, accessed
SEG_DATA: Final = 0x3  # read, write, accessed
SEG_TSS_BUSY: Final = 0xB  # with S clear: busy 32-bit or 64-bit TSS
SEG_LDT: Final = 0x2
SEG_S: Final = 1 << 4
SEG_P: Final = 1 << 7
SEG_L: Final = 1 << 13
SEG_DB: Final = 1 << 14
SEG_G: Final = 1 << 15

PTE_P: Final = 1 << 0
PTE_RW: Final = 1 << 1
PTE_PS: Final = 1 << 7

# Message-signalled interrupts. [SDM] 3A 11.11
MSI_ADDRESS: Final = 0xFEE0_0000
MSI_DEST_SHIFT: Final = 12
MSI_DEST_LOGICAL: Final = 1 << 2
MSI_DATA_VECTOR: Final = 0xFF
MSI_DATA_DELIVERY_SHIFT: Final = 8
MSI_DATA_ASSERT: Final = 1 << 14
MSI_DATA_LEVEL: Final = 1 << 15
