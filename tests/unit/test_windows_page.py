"""docs/windows.md says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm.hypervisor.whp.failures import ENABLE_COMMANDS

PAGE = Path(__file__).parents[2] / "docs/windows.md"


@pytest.mark.parametrize("command", ENABLE_COMMANDS)
def test_the_commands_are_those_of_the_hint(command: str) -> None:
    assert command in PAGE.read_text()


def test_the_status_is_honest() -> None:
    assert "has not yet run on a real" in PAGE.read_text()
