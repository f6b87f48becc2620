"""A real PgBouncer in front of a test server."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import Server, unprivileged_user


@contextlib.contextmanager
def pgbouncer(server: Server, **settings: str) -> Iterator[Path]:
    """Run PgBouncer for the duration of the block; yield the folder of its Unix socket, with port 6432."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("pgbouncer is not installed (Debian package pgbouncer)")
    with tempfile.TemporaryDirectory(prefix="abpgb-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        lines = {"unix_socket_dir": name, "listen_port": "6432", "listen_addr": "", "auth_type": "any", **settings}
        configuration = folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={server.folder} user=postgres\n[pgbouncer]\n"
            + "".join(f"{key} = {value}\n" for key, value in lines.items())
        )
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([program, "-q", str(configuration)], user=unprivileged_user(), stderr=log)
        try:
            end = time.monotonic() + 30
            while not (folder / ".s.PGSQL.6432").exists():
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.02)
            yield folder
        finally:
            process.terminate()
            process.wait()
