"""Password checks: bounded work, cached successes, and a reserved thread that guessing cannot block."""

import asyncio
import threading

import pytest
from argon2 import PasswordHasher

from authbackend.passwords import Busy, PasswordChecker
from tests.service.conftest import HASH, until
from tests.unit.fleet import account


class Watched:
    def __init__(self):
        self.results = []

    def checked(self, result):
        self.results.append(result)

    def running(self, number):
        pass


OPS = account("ops", password_hash=HASH)


@pytest.fixture
def observer():
    return Watched()


@pytest.fixture
def make(observer):
    made = []

    def build(**values):
        made.append(PasswordChecker(observer, **values))
        return made[-1]

    yield build
    for checker in made:
        checker.close()


async def test_right_wrong_and_remembered(make, observer):
    checker = make()
    assert await checker.check(OPS, "correct horse")
    assert await checker.check(OPS, "correct horse")
    assert not await checker.check(OPS, "wrong horse")
    assert observer.results == ["right", "remembered", "wrong"]


async def test_a_new_password_ends_what_is_remembered(make, observer):
    checker = make()
    assert await checker.check(OPS, "correct horse")
    changed = account("ops", password_hash=PasswordHasher(1, 64, 1).hash("new horse"))
    assert not await checker.check(changed, "correct horse")
    assert await checker.check(changed, "new horse")


async def test_memory_of_successes_is_bounded_and_can_be_off(make, observer):
    checker = make(remember_most=1)
    other = account("other", password_hash=HASH)
    await checker.check(OPS, "correct horse")
    await checker.check(other, "correct horse")
    await checker.check(OPS, "correct horse")
    assert observer.results == ["right", "right", "right"]
    off = make(remember_s=0)
    await off.check(OPS, "correct horse")
    await off.check(OPS, "correct horse")
    assert "remembered" not in observer.results


async def test_an_unknown_name_and_an_account_without_password_never_pass(make):
    checker = make()
    assert not await checker.check(None, "x")
    assert not await checker.check(account("new", password_hash=None), "x")
    assert not await checker.check(account("new", password_hash=None), "")


async def test_a_broken_hash_never_passes(make):
    assert not await make().check(account("odd", password_hash="$argon2id$nonsense"), "x")


@pytest.fixture
def held(monkeypatch):
    """Makes hashing wait until it is released, as under an attack."""
    gate = threading.Event()
    real = PasswordChecker._verify

    def slow(self, stored, password):
        gate.wait(60)
        return real(self, stored, password)

    monkeypatch.setattr(PasswordChecker, "_verify", slow)
    yield gate
    gate.set()


async def test_more_checks_than_may_wait_are_refused_at_once(make, observer, held):
    checker = make(threads=1, queue=1)
    waiting = [asyncio.create_task(checker.check(None, str(n))) for n in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await checker.check(OPS, "correct horse")
    held.set()
    await asyncio.gather(*waiting)
    assert observer.results.count("refused") == 1

    async def free():
        return checker.running == 0

    await until(free, "the slots are free again")
    assert await checker.check(OPS, "correct horse")


async def test_a_reserved_account_has_a_slot_of_its_own(make, held):
    checker = make(threads=1, queue=0, reserved=("ops",))
    guess = asyncio.create_task(checker.check(None, "guess"))
    await asyncio.sleep(0)
    with pytest.raises(Busy):
        await checker.check(account("other", password_hash=HASH), "correct horse")
    login = asyncio.create_task(checker.check(OPS, "correct horse"))
    await asyncio.sleep(0)
    held.set()
    assert await login
    assert not await guess


async def test_device_decisions_do_not_wait_for_passwords(service, held):
    logins = [asyncio.create_task(service.login("ops", password=f"guess{n}")) for n in range(30)]

    async def full():
        return await service.metric("authbackend_password_checks_running") == 18  # two threads and a queue of sixteen

    await until(full, "as many guesses as possible are being checked")
    assert await service.login("APM0001") == "allow"
    held.set()
    answers = await asyncio.gather(*logins)
    assert set(answers) == {"deny"}
    assert await service.metric("authbackend_decisions_total", reason="password_checks_busy") > 0


async def test_an_account_removed_during_its_check_is_denied(service, sql, held):
    login = asyncio.create_task(service.login("ops", password="correct horse"))

    async def begun():
        return await service.metric("authbackend_password_checks_running") == 1

    await until(begun, "the password is being checked")
    assert await service.metric("authbackend_registry_entries", entity="account") == 1
    await sql("delete from account")

    async def gone():
        return await service.metric("authbackend_registry_entries", entity="account") == 0

    await until(gone, "the account is gone from the copy")
    held.set()
    assert await login == "deny"
