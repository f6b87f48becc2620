"""Every reader is given its seeds and what fuzzing found (``tests/cases/fuzz``), and what must hold does."""

import warnings

import pytest

from tests.fuzz.readers import CASES, READERS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param(name, content, id=f"{name}: {what}")
        for name, reader in READERS.items()
        for what, content in reader.inputs()
    ],
)
def test_what_must_hold_does(name, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the commands do
        READERS[name].check(content)


def test_every_case_is_given_to_a_reader():
    assert {folder.name for folder in (CASES / "fuzz").iterdir()} <= set(READERS)
