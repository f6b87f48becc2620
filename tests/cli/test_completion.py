"""Shells complete commands, options and values; a real bash does in ``tests/deploy/test_wheel.py``."""

import pytest
from click.testing import CliRunner

from authbackend.cli import main


def invoke(*arguments, **environment):
    result = CliRunner().invoke(main, arguments, prog_name="authbackend", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_the_command(shell):
    assert f"_AUTHBACKEND_COMPLETE={shell}_complete" in invoke("completion", shell)


@pytest.mark.parametrize(
    ("words", "incomplete", "completed"),
    [
        ("authbackend pol", "pol", ["policy"]),
        ("authbackend policy apply --acc", "--acc", ["--accept-impact"]),
        ("authbackend device list --status sus", "sus", ["suspended"]),
        ("authbackend completion f", "f", ["fish"]),
    ],
)
def test_commands_options_and_values_are_completed(words, incomplete, completed):
    printed = invoke(_AUTHBACKEND_COMPLETE="fish_complete", COMP_WORDS=words, COMP_CWORD=incomplete)
    assert [line.split(",")[1].split("\t")[0] for line in printed.splitlines()] == completed
