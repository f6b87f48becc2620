"""The manual page has every command and option, and nothing in a help text is a request to troff."""

import click

from authbackend.cli import main
from authbackend.cli.manual import manual_page


def commands(command, path=("authbackend",)):
    """Yield every command below a group with its path."""
    for name, each in command.commands.items():
        yield (*path, name), each
        if isinstance(each, click.Group):
            yield from commands(each, (*path, name))


def test_every_command_and_option_is_there():
    sections = {}
    for section in manual_page(main, "authbackend", "1.2").split("\n.SS ")[1:]:
        title, _, text = section.partition("\n")
        sections[title] = text.partition("\n.SH ")[0]
    named = {" ".join(path).replace("-", "\\-"): command for path, command in commands(main)}
    assert list(sections) == sorted(named, key=list(sections).index)
    for title, command in named.items():
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for option in parameter.opts:
                    assert option.replace("-", "\\-") in sections[title], title


def test_every_option_says_what_it_does():
    missing = {
        f"{' '.join(path)} {parameter.opts[0]}"
        for path, command in commands(main)
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    }
    assert missing == set()


def test_nothing_in_a_help_text_is_a_request_or_a_quote():
    @click.group(epilog="'so' on\n\n.so /etc/passwd")
    def example():
        """.de an example of \\*(x, quoted."""

    @example.command()
    @click.option("--at-all", metavar=".PP", help=".br")
    def one(at_all):
        """First.

        \b
        .sp
          kept  as it is
        """

    lines = manual_page(example, "example", "1.2").splitlines()
    requests = {line.split()[0] for line in lines if line.startswith((".", "'"))}
    assert requests == {'.\\"', ".TH", ".SH", ".SS", ".TP", ".PP", ".nf", ".fi", ".BR"}
    assert "example \\- \\&.de an example of \\e*(x, quoted" in lines
    assert lines[lines.index(".SH EXIT STATUS") + 1 :][:3] == ["\\(aqso\\(aq on", ".PP", "\\&.so /etc/passwd"]
    section = lines[lines.index(".SS example one") : lines.index(".SH EXIT STATUS")]
    assert section[2:] == [
        *(".PP", "First.", ".PP"),
        *(".nf", "\\&.sp", "  kept  as it is", ".fi"),
        *(".TP", "\\fB\\-\\-at\\-all .PP\\fR", "\\&.br"),
    ]
