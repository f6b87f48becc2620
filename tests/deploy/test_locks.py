"""What CI and the image install: exactly what requirements/ holds, whoever serves it."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent.parent
LOCKS = sorted((REPO / "requirements").glob("*.lock"))
PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^ ;\\]+)", re.MULTILINE)


def packages(lock):
    return dict(PINNED.findall(lock.read_text(encoding="utf-8")))


def test_there_is_one_for_each_use():
    assert [lock.stem for lock in LOCKS] == ["build", "dev", "fuzz", "run", "service"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_package_has_a_version_and_digests_and_no_index_is_named(lock):
    text = lock.read_text(encoding="utf-8")
    entries = re.split(r"\n(?=[A-Za-z0-9])", "\n" + text)[1:]
    assert entries
    for entry in entries:
        assert PINNED.match(entry), entry.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry.splitlines()[0]
    assert "://" not in text
    assert not re.search(r"^\s*--?(index-url|extra-index-url|find-links|trusted-host|i|f)\b", text, re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_package_has_one_version_everywhere(lock):
    everything = packages(REPO / "requirements" / "dev.lock")
    assert {name: everything.get(name, version) for name, version in packages(lock).items()} == packages(lock)
    if lock.stem not in ("build", "fuzz"):
        assert packages(lock).keys() <= everything.keys()


def test_ci_and_the_image_install_with_digests_only():
    for name in ("Dockerfile", "Makefile", "tools/test-python"):
        text = (REPO / name).read_text(encoding="utf-8").replace("\\\n", " ")
        installs = re.findall(r"\bpip\"? (?:--python \S+ )?install [^&\n]*", text)
        assert installs, name
        for install in installs:
            assert "--require-hashes" in install or "--no-deps" in install, f"{name}: {install}"


def test_the_image_says_what_it_is_and_its_base_can_be_pinned():
    text = (REPO / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"${BASE}"}
    labels = set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", text))
    assert labels >= {"title", "description", "licenses", "version", "revision", "created", "base.name"}
