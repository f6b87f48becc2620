"""A shell that keeps its folder and variables from command to command, as a person's does, and the services started in it."""

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from authbackend.__main__ import main

# Bash with what the command before left: folder and variables; the prompt of psql is psql, connected as AUTHBACKEND_DATABASE__DSN says.
SESSION = """
. "$0/variables"; cd "$(cat "$0/folder")"
eval "$1"
ended=$?; export -p >"$0/variables"; env -0 >"$0/environment"; pwd >"$0/folder"; exit $ended
"""
SERVICE = '. "$0/variables"; cd "$(cat "$0/folder")"; eval "exec $1"'
PLAIN = re.compile(r"authbackend [^|<>&;$`]+")
READY = {"authbackend serve": "answering RabbitMQ on", "authbackend crl sync": '"crl.replaced"'}
LISTENERS = {"8080": r"answering RabbitMQ on (\S+),", "8081": r"people on (\S+),", "8082": r"Prometheus on (\S+)"}
# A plain command of authbackend is run in a fork of a process that has imported it already, which saves a second for each.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["authbackend.cli"])


def _be_authbackend(arguments, environment, folder, output):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in ((0, os.devnull), (1, output), (2, output)):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), number)
    sys.argv = arguments
    main()


class Shell:
    """
    A shell in a folder.

    Args:
        folder: Where commands run.
        state: A folder of the shell's own.
        variables: Beside those of this process without ``AUTHBACKEND_…``.
        path: Folders before those of PATH.

    Attributes:
        here: Names and addresses on the page, and those of this test; in what is printed, they are the page's again.
        instead: Parts of commands that are other ones here.
        before: What happens between two commands of the page, by the beginning of the later one.
        typed: What a person types into a command, by its beginning.
    """

    def __init__(self, folder, state, variables, path):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AUTHBACKEND_", "PG"))}
        self.folder = folder
        self.here, self.instead, self.before, self.typed = {}, {}, {}, {}
        self._state, self._services = state, []
        path = [*path, Path(sys.executable).parent, folder / "bin", inherited["PATH"]]
        variables = {**inherited, **variables, "PATH": ":".join(map(str, path)), "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items() if name.isidentifier()]
        (state / "variables").write_text("".join(lines))
        (state / "folder").write_text(f"{folder}\n")
        self.do("true")

    def do(self, command, **variables):
        """Run a command that is not on the page; it must succeed."""
        ended, printed = self._run(
            " ".join([f"{name}={shlex.quote(value)}" for name, value in variables.items()] + [command])
        )
        assert ended == 0, f"$ {command}\n{printed}"
        return printed

    def run(self, prompt, command):
        """Run a command of the page, or start it if it is a service; returns exit status and output, as on the page."""
        for beginning, prepare in self.before.items():
            if command.startswith(beginning):
                prepare()
        if any(command.startswith(service) for service in READY):
            self.start(command)
            return 0, ""
        if prompt.endswith("=>"):
            command = f'psql -X "$AUTHBACKEND_DATABASE__DSN" -c {shlex.quote(command)}'
        typed = next((text for beginning, text in self.typed.items() if command.startswith(beginning)), "")
        return self._run(command, typed)

    def _run(self, command, typed=""):
        command = self._localized(command)
        ended, printed = self._forked(command) if PLAIN.fullmatch(command) else self._in_bash(command, typed)
        for shown, real in self.here.items():
            printed = printed.replace(real, shown)
        return ended, printed

    def _forked(self, command):
        environment = (self._state / "environment").read_text().rstrip("\0").split("\0")
        output = self._state / "output"
        output.write_text("")
        process = _forks.Process(
            target=_be_authbackend,
            args=(
                shlex.split(command, comments=True),
                dict(line.split("=", 1) for line in environment),
                (self._state / "folder").read_text().rstrip("\n"),
                str(output),
            ),
        )
        process.start()
        process.join()
        return process.exitcode, output.read_text(encoding="utf-8")

    def _in_bash(self, command, typed):
        done = subprocess.run(
            ["bash", "-c", SESSION, str(self._state), command],
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            start_new_session=True,  # without a terminal, so that a program that asks for a passphrase reads it here
        )
        return done.returncode, done.stdout

    def _localized(self, command):
        for shown, real in (self.instead | self.here).items():
            command = command.replace(shown, real)
        return command

    def start(self, command):
        """Start a service, and return what it says until it is ready; its addresses are those of the page from then on."""
        ready = next(line for beginning, line in READY.items() if command.startswith(beginning))
        if "--embedded" in command:
            ready = "Stop with" if "--sample" in command else "export AUTHBACKEND_DATABASE__DSN="
        service = subprocess.Popen(
            ["bash", "-c", SERVICE, str(self._state), self._localized(command)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._services.append(service)
        said = []
        for line in service.stderr:
            said.append(line)
            if ready in line:
                break
        else:
            raise AssertionError(f"$ {command}\nended with exit status {service.wait()}\n{''.join(said)}")
        threading.Thread(target=service.stderr.read, daemon=True).start()  # or it waits when the pipe is full
        self._learn("".join(said))
        return "".join(said)

    def _learn(self, said):
        for port, pattern in LISTENERS.items():
            if listening := re.search(pattern, said):
                self.here[f"http://127.0.0.1:{port}"] = listening[1]
        if embedded := re.search(r"export AUTHBACKEND_DATABASE__DSN='(.*)'", said):
            self.here["postgresql://…"] = embedded[1]

    def close(self):
        """End the services, the last one first."""
        for service in reversed(self._services):
            service.terminate()
            service.wait()
            service.stderr.close()
