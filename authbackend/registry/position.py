"""Positions in the change feed, which say what a reader has read, in PostgreSQL's transaction ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FeedPosition:
    """
    How far a reader has read the change feed.

    Args:
        epoch: Identifies the server and its tables; within it, no transaction id is reused.
        incarnation: Renewed by every crash recovery.
        snapshot: ``xmin:xmax:xip,...`` of ``pg_current_snapshot()``.
    """

    epoch: str
    incarnation: str
    snapshot: str

    @property
    def xmin(self) -> int:
        """The oldest transaction id that was still running."""
        return int(self.snapshot.split(":")[0])

    @property
    def xmax(self) -> int:
        """One past the newest transaction id that was visible or running."""
        return int(self.snapshot.split(":")[1])

    @property
    def running(self) -> list[str]:
        """The transaction ids between the two that were not visible."""
        text = self.snapshot.split(":")[2]
        return text.split(",") if text else []

    def same_life(self, other: FeedPosition) -> bool:
        """Return whether transaction ids can be compared between the two."""
        return (self.epoch, self.incarnation) == (other.epoch, other.incarnation)

    def serves(self, transaction: int) -> bool:
        """Return whether a change made by this transaction of the same epoch is part of the copy."""
        return transaction < self.xmin or (transaction < self.xmax and str(transaction) not in self.running)
