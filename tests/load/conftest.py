"""Certificates of a small fleet, made once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from authbackend_load import certificates

COUNT, REVOKED = 12, 2


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make APM000001 to APM000012, of which the last two are revoked; return the directory."""
    place = tmp_path_factory.mktemp("fleet")
    certificates.make(place, certificates.device_ids("APM", COUNT), device_type="APM", revoked=REVOKED)
    return place
