"""Waiting for many descriptors at once: epoll where there is one, the standard selectors elsewhere.

Thinner than ``selectors`` for two reasons: no key objects on the path of every packet, and epoll tells that the
other end is gone altogether (``HANGUP``) even when nothing else is asked for, which ``selectors`` cannot express.
"""

from __future__ import annotations

import sys
from typing import Final

READABLE: Final = 1
WRITABLE: Final = 2
HANGUP: Final = 4

if sys.platform == "linux":
    import select

    _TO_EPOLL: Final = [0, select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT]
    _GONE: Final = select.EPOLLHUP | select.EPOLLERR

    class Poller:
        """Descriptors and what to wait for on each. One thread only. Level-triggered."""

        def __init__(self) -> None:
            self._epoll = select.epoll()
            self._masks: dict[int, int] = {}

        def set(self, fd: int, mask: int) -> None:
            """Wait on ``fd`` for the conditions in ``mask``; 0 forgets it. Raises OSError for a bad descriptor."""
            old = self._masks.get(fd, 0)
            if mask == old:
                return
            if not mask:
                del self._masks[fd]
                try:
                    self._epoll.unregister(fd)
                except OSError:
                    pass  # closed already, which takes it out of the set by itself
                return
            if old:
                self._epoll.modify(fd, _TO_EPOLL[mask & 3])
            else:
                self._epoll.register(fd, _TO_EPOLL[mask & 3])
            self._masks[fd] = mask

        def wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
            """Block until something is ready; (descriptor, conditions) pairs. ``HANGUP`` comes unasked."""
            ready = []
            for fd, events in self._epoll.poll(timeout_s):
                mask = 0
                if events & select.EPOLLIN:
                    mask |= READABLE
                if events & select.EPOLLOUT:
                    mask |= WRITABLE
                if events & _GONE:
                    mask |= HANGUP
                ready.append((fd, mask))
            return ready

        def close(self) -> None:
            """Free the descriptor. Idempotent."""
            self._epoll.close()

else:
    import selectors
    import time

    class Poller:
        """Descriptors and what to wait for on each. One thread only. Never reports ``HANGUP``."""

        def __init__(self) -> None:
            self._selector = selectors.DefaultSelector()
            self._masks: dict[int, int] = {}

        def set(self, fd: int, mask: int) -> None:
            """Wait on ``fd`` for the conditions in ``mask``; 0 forgets it. Raises OSError for a bad descriptor."""
            mask &= READABLE | WRITABLE
            old = self._masks.get(fd, 0)
            if mask == old:
                return
            if not mask:
                del self._masks[fd]
                self._selector.unregister(fd)
                return
            events = (selectors.EVENT_READ if mask & READABLE else 0) | (
                selectors.EVENT_WRITE if mask & WRITABLE else 0
            )
            if old:
                self._selector.modify(fd, events)
            else:
                self._selector.register(fd, events)
            self._masks[fd] = mask

        def wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
            """Block until something is ready; (descriptor, conditions) pairs."""
            if not self._masks:  # select() refuses three empty sets on Windows
                time.sleep(0.1 if timeout_s is None else timeout_s)
                return []
            ready = []
            for key, events in self._selector.select(timeout_s):
                mask = READABLE if events & selectors.EVENT_READ else 0
                if events & selectors.EVENT_WRITE:
                    mask |= WRITABLE
                ready.append((key.fd, mask))
            return ready

        def close(self) -> None:
            """Free the descriptors. Idempotent."""
            self._selector.close()
