"""The test runner itself."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent.parent


def test_tests_in_several_processes_are_of_the_postgresql_that_was_asked_for():
    """A missing version is an error; another version is never tested instead."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--numprocesses=1",
            "tests/postgres/test_constraints.py",
            "-k",
            "the_tags_agree",
        ],
        env={**environment, "AUTHBACKEND_TEST_POSTGRES": "9"},
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "PostgreSQL '9' is not tested; choose one of 15, 16, 17, 18" in done.stdout


def test_a_part_of_the_tests_that_there_is_not_fails_and_is_told():
    done = subprocess.run([REPO / "tools/test", "brokr"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("test: there is no part brokr\n")
