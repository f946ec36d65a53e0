"""The ``microvm`` command. One module a subcommand, imported when it is used."""

from __future__ import annotations

from .dispatch import main

__all__ = ["main"]
