"""The tutorial works as it is written: its commands are run, and their output is compared."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(console|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def commands(text):
    """Yield (command, expected output) of a console block; ``…`` in the output is any text."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


@pytest.fixture
def folder():
    """A folder that the user whom PostgreSQL runs as may enter, too."""
    with tempfile.TemporaryDirectory(prefix="authbackend-tutorial-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def shell(folder):
    """The service that the tutorial starts, and a function that runs a command beside it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTHBACKEND_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for listener in ("BROKER", "ADMIN", "HEALTH"):
        environment[f"AUTHBACKEND_{listener}__LISTEN"] = "127.0.0.1:0"
    service = subprocess.Popen(
        ["authbackend", "serve", "--embedded", ".data"],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        address = None
        for line in service.stderr:
            if found := re.search(r"answering RabbitMQ on (\S+),", line):
                address = found[1]
            if found := re.search(r"export AUTHBACKEND_DATABASE__DSN='(.*)'", line):
                environment["AUTHBACKEND_DATABASE__DSN"] = found[1]
                break
        assert address, "the service did not start"

        def run(command):
            done = subprocess.run(
                ["bash", "-c", command.replace("http://127.0.0.1:8080", address)],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            return done.stdout

        yield run
    finally:
        service.terminate()
        service.stderr.close()
        service.wait()


def test_every_command_prints_what_the_page_says(shell, folder):
    ran = 0
    for kind, text in blocks():
        if kind == "yaml":
            (folder / "fleet.yaml").write_text(text, encoding="utf-8")
            continue
        for command, expected in commands(text):
            if command.startswith(("authbackend serve", "export ")):
                continue  # the fixture does it
            printed = shell(command)
            pattern = ".*".join(re.escape(part) for part in expected.rstrip("\n").split("…"))
            assert re.fullmatch(pattern, printed.rstrip("\n")), f"$ {command}\n{printed}"
            ran += 1
    assert ran > 8
