"""``certs``: all certificates of a test set-up in one command."""

from __future__ import annotations

from pathlib import Path

import click

from authbackend.cli.common import json_option, show
from authbackend.pki.bench_ca import PKIError
from authbackend.pki.bench_certificates import Outcome, make_certificates

_PURPOSE = {
    "ca": "authority of devices and broker; ca.pem goes to every device and to the broker",
    "internal-ca": "authority of the channel between broker and authbackend; internal-ca.pem goes to both",
    "rabbitmq": "the broker's listeners",
    "authbackend": "authbackend's listener for the broker",
    "broker-client": "the broker's login to authbackend",
}
_WHERE = """
What goes where (NAME.pem is public; NAME.key is secret, mode 600, owned by who reads it):
  broker       /etc/rabbitmq/certs/   ca.pem internal-ca.pem rabbitmq.pem rabbitmq.key
                                      broker-client.pem broker-client.key
               chown -R rabbitmq: /etc/rabbitmq/certs
  authbackend  AUTHBACKEND_BROKER__TLS__CERTIFICATE_FILE={directory}/authbackend.pem
               AUTHBACKEND_BROKER__TLS__KEY_FILE={directory}/authbackend.key
               AUTHBACKEND_BROKER__TLS__CLIENT_CA_FILE={directory}/internal-ca.pem
  a device     ca.pem and its own NAME.pem NAME.key
  nowhere      ca.key and internal-ca.key sign new certificates: keep them here only
These authorities are for trying things out. For production use your own, or make one: authbackend ca init"""


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--device",
    "devices",
    metavar="NAME",
    multiple=True,
    help="Common name of a device; may be repeated.",
)
@click.option(
    "--server",
    "servers",
    metavar="NAME",
    multiple=True,
    help="Host name or address by which clients reach the broker; may be repeated. "
    "Default: localhost, 127.0.0.1, ::1 and rabbitmq.",
)
@json_option
def certs(directory: Path, devices: tuple[str, ...], servers: tuple[str, ...], as_json: bool) -> None:
    """
    Create the certificates of a test set-up in DIR.

    Two authorities (one for devices and broker, one for the channel between broker and authbackend), the
    servers' certificates, the broker's login, and one certificate for each device. Existing files are kept,
    so the command can be repeated to add devices. A server's certificate is replaced if its names change, if
    another authority signed it, or in its last 30 days.

    For demonstrations and tests only: the authorities' keys are stored unencrypted in DIR.
    """
    try:
        outcomes = list(make_certificates(directory, devices=devices, servers=servers or None))
    except PKIError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error.filename or directory}: {error.strerror}") from error
    result = [
        {"file": f"{directory / outcome.name}.pem", "written": outcome.written, "expires": outcome.expires.isoformat()}
        for outcome in outcomes
    ]
    where = _WHERE.format(directory=directory.absolute())
    show(result, as_json, lambda: [*(_line(directory, outcome) for outcome in outcomes), where])


def _line(directory: Path, outcome: Outcome) -> str:
    purpose = _PURPOSE.get(outcome.name, "a device")
    verb = "wrote" if outcome.written else "kept "
    note = f" ({outcome.note})" if outcome.note else ""
    path = f"{directory / outcome.name}.pem .key"
    return f"{verb} {path:<36} until {outcome.expires:%Y-%m-%d}  {purpose}{note}"
