"""microvm: an embeddable microVM monitor."""

from ._version import __version__

__all__ = ["__version__"]
