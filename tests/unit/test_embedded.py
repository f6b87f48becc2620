"""The embedded PostgreSQL's lock file is in a folder of the same user, never in one that another user has prepared."""

import os
import tempfile

import pytest

from authbackend.errors import ConfigurationError
from authbackend.postgres import embedded


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", {})
    return tmp_path


def test_each_user_has_a_folder_of_its_own(temporary):
    embedded._own_runtime_folder()
    embedded._own_runtime_folder()
    folder = temporary / f"authbackend-{os.getuid()}"
    assert os.environ["XDG_RUNTIME_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_session_gives_is_taken(temporary):
    os.environ["XDG_RUNTIME_DIR"] = "/run/user/1"
    embedded._own_runtime_folder()
    assert os.listdir(temporary) == []


def test_a_folder_that_somebody_else_prepared_is_refused(temporary):
    (temporary / "elsewhere").mkdir()
    (temporary / f"authbackend-{os.getuid()}").symlink_to(temporary / "elsewhere")
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        embedded._own_runtime_folder()
