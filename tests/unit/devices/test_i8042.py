from __future__ import annotations

from microvm.devices.i8042 import I8042


def test_reset_command_resets_and_others_do_not() -> None:
    resets: list[int] = []
    device = I8042(lambda: resets.append(1))
    for command in (0x20, 0x60, 0xAA, 0xD1, 0xFF):
        device.pio_write(0, 1, command)
    assert resets == []
    device.pio_write(0, 1, 0xFE)
    assert resets == [1]


def test_kernel_gives_up_probing_and_never_waits_to_reset() -> None:
    device = I8042(lambda: None)
    # i8042_flush: output that stays full after 16 reads means that there is no controller
    assert all(device.pio_read(0, 1) & 1 for _ in range(17))
    # kb_wait: input empty
    assert device.pio_read(0, 1) & 2 == 0
