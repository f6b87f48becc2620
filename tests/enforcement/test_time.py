"""Receipts use the database's clock, not that of the replica that enforces."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from authbackend.postgres.change_feed import ChangeFeed
from tests.enforcement.conftest import Rig

BEHIND_S = 3600.0


async def test_a_receipt_of_a_replica_whose_clock_is_behind_claims_no_other_times(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica uses the test's clock; the database's clock is made to look an hour ahead."""
    position = ChangeFeed._position

    def ahead(feed: ChangeFeed, row: Any) -> Any:
        feed_read, floor = position(feed, row)
        assert feed_read is not None
        return replace(feed_read, confirmed_at=feed_read.confirmed_at + timedelta(seconds=BEHIND_S)), floor

    monkeypatch.setattr(ChangeFeed, "_position", ahead)
    await rig.devices("A")
    async with rig.enforcing():
        await rig.set_status("revoked", "A")
        (task,) = await rig.finished()
    there = time.time() + BEHIND_S
    assert task["receipt"]["confirmed_at"] == pytest.approx(there, abs=60)
    assert datetime.fromisoformat(task["receipt"]["checked_at"]).timestamp() == pytest.approx(there, abs=60)
