"""Public test doubles: what a device or backend author needs to test without a guest."""

from .driver import FakeDriver, Used

__all__ = ["FakeDriver", "Used"]
