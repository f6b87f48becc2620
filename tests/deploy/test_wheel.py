"""The wheel, built from the source archive and installed away from the checkout, has everything that its commands read."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from authbackend import __version__
from authbackend.postgres.migrate import migrations

REPO = Path(__file__).parent.parent.parent


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build", "--directory", folder, "--target")
    run(*build, "sdist", cwd=REPO)
    (archive,) = folder.glob("*.tar.gz")
    run("tar", "-xzf", archive, "-C", folder)
    run(*build, "wheel", cwd=folder / archive.name.removesuffix(".tar.gz"))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel in it. Its dependencies are those of this one, read from where they are."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (packages,) = folder.glob("lib/python3*/site-packages")
    # Of the folder that a .pth file names, no .pth file is read: this checkout, installed there for editing, stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-deps", "--no-index", wheel)
    return folder


@pytest.fixture
def environment(installed):
    """Environment variables under which the shell finds the installed commands first."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AUTHBACKEND_", "PYTHON"))}
    listeners = {f"AUTHBACKEND_{name}__LISTEN": "127.0.0.1:0" for name in ("BROKER", "ADMIN", "HEALTH")}
    return {**inherited, **listeners, "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}


@pytest.fixture
def call(environment, tmp_path):
    """Run a command line in a shell, in an empty folder."""
    return lambda line, **more: run("bash", "-c", line, cwd=tmp_path, env={**environment, **more})


@pytest.fixture
def empty_database(postgres):
    postgres.psql("postgres", "create database of_the_wheel")
    yield "of_the_wheel"
    postgres.psql("postgres", "drop database of_the_wheel with (force)")


def test_it_has_types_sql_and_the_manual_page(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        page = f"authbackend-{__version__}.data/data/share/man/man1/authbackend.1"
        assert opened.read(page) == (REPO / "docs/authbackend.1").read_bytes()
    files = [
        str(file.relative_to(REPO))
        for folder in ("authbackend", "authbackend_load", "sql")
        for file in (REPO / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    expected = {f"authbackend/{name}" if name.startswith("sql/") else name for name in files}
    assert {"authbackend/py.typed", "authbackend_load/py.typed", "authbackend/sql/roles.sql"} <= expected
    assert {name for name in names if ".dist-info/" not in name and ".data/" not in name} == expected


def test_commands_work_without_the_checkout(call, installed, empty_database, postgres):
    assert str(installed) in call("python -c 'import authbackend; print(authbackend.__file__)'")
    assert call("authbackend --version") == f"authbackend, version {__version__}\n"
    assert (installed / "share/man/man1/authbackend.1").exists()
    fleet = shutil.copy(next(installed.glob("lib/*/site-packages/authbackend/sample-fleet.yaml")), installed)
    assert "0 errors" in call(f"authbackend policy check {fleet}")

    database = {"AUTHBACKEND_DATABASE__DSN": postgres.dsn(empty_database)}
    assert len(json.loads(call("authbackend migrate --json", **database))["applied"]) == len(migrations())
    postgres.psql(empty_database, call("authbackend roles"))
    assert "applied" in call(f"authbackend policy apply {fleet}", **database)
    explain = "authbackend explain APM0001 publish fleet/APM0001/telemetry/speed"
    assert call(explain, **database).startswith("ALLOW")

    assert "1 certificates written" in call("authbackend-load certificates load --count 1 --processes 1")


def test_it_serves(environment, tmp_path, dsn):
    service = subprocess.Popen(
        ["authbackend", "serve"],
        cwd=tmp_path,
        env={**environment, "AUTHBACKEND_DATABASE__DSN": dsn},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed = []
        for line in service.stderr:
            printed.append(line)
            if "answering RabbitMQ on" in line:
                break
        assert "answering RabbitMQ on" in printed[-1], "".join(printed)
        service.send_signal(signal.SIGTERM)
        service.communicate(timeout=60)
        assert service.returncode == 0
    finally:
        service.kill()
        service.communicate()


def test_bash_completes_a_word(call):
    line = """
        eval "$(authbackend completion bash)"
        [[ $(complete -p authbackend) =~ -F\\ ([^ ]+) ]]
        COMP_WORDS=(authbackend policy ch) COMP_CWORD=2
        "${BASH_REMATCH[1]}" authbackend
        echo "${COMPREPLY[@]}"
    """
    assert call(line) == "check\n"


def test_what_it_depends_on_is_what_the_tests_ran_with(installed):
    """No bound of pyproject.toml keeps out a version that is installed here."""
    checked = run(sys.executable, "-m", "pip", "--python", installed / "bin/python", "check")
    assert re.search("No broken requirements", checked)
