"""What hand-overs to one peer share beside the order in which they write."""

from __future__ import annotations

import asyncio
import threading
import typing
from typing import Any

import pytest

from spec.errors import TransferFailed
from worker.link import Link

WAITING = 40  # more than the event loop's own threads


class SlowPeer:
    """Nothing is proven before `proven` is set, or at all where it is `stuck`."""

    def __init__(self, stuck: bool) -> None:
        self.proven, self.stuck, self.releases = threading.Event(), stuck, 0

    def release(self) -> None:
        self.releases += 1
        assert self.proven.wait(30)
        if self.stuck:
            raise TransferFailed("the owner does not confirm")


@pytest.mark.parametrize("stuck", [False, True])
async def test_hand_overs_that_wait_for_one_peer_share_one_release(stuck: bool) -> None:
    link, peer = Link(), SlowPeer(stuck)
    waiting = [asyncio.create_task(link.release(typing.cast("Any", peer))) for _ in range(WAITING)]
    await asyncio.sleep(0)
    waiting.pop().cancel()
    try:
        async with asyncio.timeout(10):
            await asyncio.to_thread(lambda: None)  # what needs a thread goes on
    finally:
        peer.proven.set()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [TransferFailed if stuck else type(None)] * (WAITING - 1)
    assert peer.releases == 1
    peer.stuck = False
    await link.release(typing.cast("Any", peer))
    assert peer.releases == 2, "it is asked anew"
