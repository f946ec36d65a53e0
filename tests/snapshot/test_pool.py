"""Pools of sandboxes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from microvm import Pool, Sandbox, aio
from microvm.errors import ConfigError, ExecTimeout, StateError

pytestmark = [pytest.mark.boots, pytest.mark.timeout(120)]


def test_taken_sandboxes_are_fresh_and_are_replaced(guests: str) -> None:
    with Pool(2, guests, memory_mib=128) as pool:
        ids = set()
        for _ in range(4):
            with pool.take(30) as sandbox:
                assert sandbox.run("test ! -e /tmp/used && touch /tmp/used").returncode == 0
                ids.add(sandbox.run("cat /etc/machine-id").stdout)
        assert len(ids) == 4
        deadline = time.monotonic() + 20
        while pool.ready < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with pytest.raises(StateError):
        pool.take()


def test_map_keeps_order_and_counts(guests: str) -> None:
    seen: list[tuple[int, int]] = []
    with Pool(3, guests, memory_mib=128) as pool:
        results = pool.map(["echo"], range(7), progress=lambda done, total: seen.append((done, total)))
        assert [result.stdout_text.strip() for result in results] == [str(number) for number in range(7)]
        assert seen == [(number, 7) for number in range(1, 8)]
        assert [r.stdout for r in pool.map('echo "<$1>"', ["a b"])] == [b"<a b>\n"]

        def work(sandbox: Sandbox, item: int) -> int:
            return item * int(sandbox.run("echo 2").stdout)

        assert pool.map(work, [1, 2, 3]) == [2, 4, 6]
        assert pool.map(work, []) == []


def test_one_item_that_takes_too_long_or_fails_spoils_no_other(guests: str) -> None:
    def work(sandbox: Sandbox, item: str) -> Any:
        return sandbox.run(item).returncode

    with Pool(2, guests, memory_mib=128) as pool:
        found = pool.map("$1", ["sleep 60", "exit 3"], timeout=1.0, return_exceptions=True)
        assert isinstance(found[0], ExecTimeout)
        found = pool.map(work, ["true", "sleep 60", "exit 3"], timeout=1.0, return_exceptions=True)
        assert found[0] == 0
        assert isinstance(found[1], ExecTimeout)
        assert found[2] == 3
        with pytest.raises(ZeroDivisionError):
            pool.map(lambda sandbox, item: 1 // item, [1, 0])


def test_impossible_pools_are_refused(guests: str) -> None:
    with pytest.raises(ConfigError):
        Pool(0, guests)
    with pytest.raises(ConfigError):
        Pool(2, guests, memory_mib=3)
    with pytest.raises(StateError):
        Pool(2, guests).take()


def test_async_pool_and_fork(guests: str) -> None:
    async def main() -> None:
        async with aio.Pool(2, guests, memory_mib=128) as pool:
            results = await pool.map(["echo"], range(4))
            assert [result.stdout for result in results] == [b"0\n", b"1\n", b"2\n", b"3\n"]

            async def work(sandbox: aio.Sandbox, item: int) -> bytes:
                return (await sandbox.run(f"echo {item}; sleep {item}")).stdout

            found = await pool.map(work, [0, 9], timeout=1.0, return_exceptions=True)
            assert found[0] == b"0\n"
            assert isinstance(found[1], ExecTimeout)
            async with await pool.take() as sandbox:
                (child,) = await sandbox.fork()
                assert isinstance(child, aio.Sandbox)
                async with child:
                    assert (await child.run("echo child")).stdout == b"child\n"

    asyncio.run(main())
