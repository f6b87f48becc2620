"""``completion``: scripts with which a shell completes commands, options and their values."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """
    Print the script with which SHELL completes commands, options and their values.

    \b
      bash, in ~/.bashrc:                 eval "$(authbackend completion bash)"
      zsh, in ~/.zshrc, after compinit:   eval "$(authbackend completion zsh)"
      fish:  authbackend completion fish > ~/.config/fish/completions/authbackend.fish
    """  # noqa: D301 - click leaves the lines after this mark as they are
    complete = get_completion_class(shell)
    assert complete is not None
    click.echo(complete(context.find_root().command, {}, "authbackend", "_AUTHBACKEND_COMPLETE").source())
