"""How far a reader of the database has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FeedPosition:
    """
    How far a reader has come.

    Args:
        epoch: The life of the server and its tables, within which transaction ids are not given out twice.
        incarnation: Renewed by every crash recovery.
        snapshot: ``xmin:xmax:xip,...`` of ``pg_current_snapshot()``.
    """

    epoch: str
    incarnation: str
    snapshot: str

    @property
    def xmin(self) -> int:
        """The oldest transaction that was still running."""
        return int(self.snapshot.split(":")[0])

    @property
    def xmax(self) -> int:
        """One past the newest transaction id that was visible or running."""
        return int(self.snapshot.split(":")[1])

    @property
    def running(self) -> list[str]:
        """The transactions between that were not visible."""
        text = self.snapshot.split(":")[2]
        return text.split(",") if text else []

    def same_life(self, other: FeedPosition) -> bool:
        """Return whether transaction ids mean the same in both."""
        return (self.epoch, self.incarnation) == (other.epoch, other.incarnation)

    def serves(self, transaction: int) -> bool:
        """Return whether a change made by this transaction of the same epoch is part of the copy."""
        return transaction < self.xmin or (transaction < self.xmax and str(transaction) not in self.running)
