"""
The command line: one module per noun, thin.

Exit status: 0 done (``explain``: allowed), 1 unexpected failure, 2 wrong usage, input or configuration, 3 not found,
4 conflict, 5 the database cannot be reached or a lock is held: try again, 6 ``explain``: denied, 7 the database role
lacks the privilege, 8 committed, but not confirmed in time: a replica may still decide by an older version, something
that was taken away may still be connected or stored, or a node may lack the revocation list.
"""

from __future__ import annotations

import click

from authbackend import __version__
from authbackend.cli.account import account
from authbackend.cli.audit import audit
from authbackend.cli.ca import ca
from authbackend.cli.cert import cert
from authbackend.cli.certs import certs
from authbackend.cli.common import Commands
from authbackend.cli.completion import completion
from authbackend.cli.crl import crl
from authbackend.cli.device import device
from authbackend.cli.enforcement import enforcement
from authbackend.cli.enroll import enroll
from authbackend.cli.explain import explain
from authbackend.cli.policy import policy
from authbackend.cli.replicas import replicas, wait
from authbackend.cli.serve import migrate, roles, serve

__all__ = ["main"]


@click.group(
    cls=Commands,
    epilog=__doc__.partition("\n\n")[2].replace("``", ""),
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="authbackend")
@click.option(
    "--config",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Read settings from this TOML file. Default: $AUTHBACKEND_CONFIG. AUTHBACKEND_... variables override it.",
)
@click.pass_context
def main(context: click.Context, config: str | None) -> None:
    """Device authentication and authorization for RabbitMQ."""
    context.obj = config


for command in (
    serve,
    migrate,
    roles,
    policy,
    device,
    account,
    ca,
    cert,
    crl,
    replicas,
    wait,
    enforcement,
    audit,
    explain,
    certs,
    completion,
):
    main.add_command(command)
device.add_command(enroll)
