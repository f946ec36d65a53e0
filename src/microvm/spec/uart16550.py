"""16550A register offsets and bits. [PC16550D]"""

from __future__ import annotations

from typing import Final

DATA: Final = 0  # RBR on read, THR on write; divisor low with DLAB
IER: Final = 1  # divisor high with DLAB
IIR: Final = 2  # FCR on write
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7
FIFO_SIZE: Final = 16

IER_RDI: Final = 0x01
IER_THRI: Final = 0x02
IER_RLSI: Final = 0x04
IER_MSI: Final = 0x08

IIR_NO_INT: Final = 0x01
IIR_MSI: Final = 0x00
IIR_THRI: Final = 0x02
IIR_RDI: Final = 0x04
IIR_RX_TIMEOUT: Final = 0x0C
IIR_FIFO_ENABLED: Final = 0xC0

FCR_ENABLE: Final = 0x01
FCR_CLEAR_RX: Final = 0x02
FCR_CLEAR_TX: Final = 0x04
FCR_TRIGGER_LEVELS: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0x80

MCR_DTR: Final = 0x01
MCR_RTS: Final = 0x02
MCR_OUT1: Final = 0x04
MCR_OUT2: Final = 0x08
MCR_LOOP: Final = 0x10

LSR_DR: Final = 0x01
LSR_THRE: Final = 0x20
LSR_TEMT: Final = 0x40

MSR_DELTAS: Final = 0x0F
MSR_CTS: Final = 0x10
MSR_DSR: Final = 0x20
MSR_RI: Final = 0x40
MSR_DCD: Final = 0x80
