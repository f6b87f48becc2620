"""
Password checks for accounts: argon2id in a bounded thread pool, never on the event loop.

A successful check is cached briefly under a keyed hash, because RabbitMQ's management API logs in for every call. The
key is created at start and never leaves the process. A cache entry depends on the account's password hash, so a new
password invalidates it immediately.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from authbackend.policy.model import Account

_NICE = 10


class Busy(Exception):
    """All threads are in use and the queue of waiting checks is full."""


class PasswordObserver(Protocol):
    """Receives the outcome of checks, for metrics."""

    def checked(self, result: str) -> None:
        """Count a result: ``right``, ``wrong``, ``remembered`` or ``refused``."""

    def running(self, number: int) -> None:
        """Set the number of checks that run or wait for a thread."""


def hash_password(password: str) -> str:
    """Return an argon2id hash in PHC form, with the low-memory parameters of RFC 9106 (64 MiB, 3 passes)."""
    return PasswordHasher().hash(password)


class PasswordChecker:
    """
    Checks passwords and remembers recent successes.

    Args:
        threads: Checks that may run at the same time.
        queue: Checks that may wait; any more raise :class:`Busy`.
        reserved: Accounts with their own thread, which guesses at other names cannot block.
        remember_s: How long a success is remembered.
        remember_most: How many successes are remembered; beyond that, the oldest is dropped.
    """

    def __init__(
        self,
        observer: PasswordObserver,
        *,
        threads: int = 2,
        queue: int = 16,
        reserved: Iterable[str] = (),
        remember_s: float = 60.0,
        remember_most: int = 1000,
    ) -> None:
        self._observer = observer
        self._hasher = PasswordHasher()
        self._dummy_hash = self._hasher.hash(secrets.token_hex(16))
        self._key = secrets.token_bytes(32)
        self._remember_s = remember_s
        self._remember_most = remember_most
        self._remembered: dict[bytes, float] = {}
        self._common = _Lane(threads, queue)
        self._reserved = {name: _Lane(1, queue) for name in reserved}

    async def check(self, account: Account | None, password: str) -> bool:
        """
        Return whether the password is correct; False for an unknown account (None), after the same work.

        Raises:
            Busy: Too many checks are running or waiting.
        """
        stored = account.password_hash if account else None
        token = self._token(account.name if account else "", stored or "", password)
        if stored is not None and self._is_remembered(token):
            self._observer.checked("remembered")
            return True
        lane = self._reserved.get(account.name, self._common) if account else self._common
        try:
            future = lane.submit(self._verify, stored or self._dummy_hash, password)
        except Busy:
            self._observer.checked("refused")
            raise
        self._observer.running(self.running)
        try:
            right = await asyncio.wrap_future(future)
        finally:
            self._observer.running(self.running)
        right = right and stored is not None
        self._observer.checked("right" if right else "wrong")
        if right:
            self._remember(token)
        return right

    def close(self) -> None:
        """Let running checks finish; cancel waiting ones and accept no more."""
        for lane in (self._common, *self._reserved.values()):
            lane.close()

    @property
    def running(self) -> int:
        """Number of checks that run or wait for a thread."""
        return self._common.taken + sum(lane.taken for lane in self._reserved.values())

    def _verify(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (Argon2Error, InvalidHashError):
            return False

    def _token(self, name: str, stored: str, password: str) -> bytes:
        mac = hashlib.blake2b(key=self._key, digest_size=32)
        for part in (name, stored, password):
            data = part.encode()
            mac.update(len(data).to_bytes(8, "big"))
            mac.update(data)
        return mac.digest()

    def _is_remembered(self, token: bytes) -> bool:
        until = self._remembered.get(token)
        if until is None:
            return False
        if time.monotonic() >= until:
            del self._remembered[token]
            return False
        return True

    def _remember(self, token: bytes) -> None:
        self._remembered.pop(token, None)
        while self._remembered and len(self._remembered) >= self._remember_most:
            del self._remembered[next(iter(self._remembered))]
        if self._remember_s > 0 and self._remember_most > 0:
            self._remembered[token] = time.monotonic() + self._remember_s


def _lower_priority() -> None:
    """Give the event loop's thread priority on a busy core; on Linux, each thread has its own priority."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class _Lane:
    """A thread pool with a bounded queue; further work raises :class:`Busy`."""

    def __init__(self, threads: int, queue: int) -> None:
        self._most = threads + queue
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="argon2", initializer=_lower_priority)
        self.taken = 0

    def submit(self, function: object, *arguments: object) -> Future[bool]:
        if self.taken >= self._most:
            raise Busy
        loop = asyncio.get_running_loop()
        future: Future[bool] = self._pool.submit(function, *arguments)  # type: ignore[arg-type]
        self.taken += 1
        future.add_done_callback(lambda _: self._release_on(loop))
        return future

    def _release_on(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has closed in the meantime
            loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self.taken -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
