"""What the commands that sign have in common: the authority's folder and its passphrase."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from authbackend.errors import ConfigurationError, InvalidInput
from authbackend.pki.authority_folder import AuthorityFolder
from authbackend.pki.files import write_file
from authbackend.revocation import read_passphrase

PASSPHRASE_VARIABLE = "AUTHBACKEND_CA_PASSPHRASE"

folder_type = click.Path(file_okay=False, path_type=Path)
file_type = click.Path(dir_okay=False, path_type=Path)
passphrase_option = click.option(
    "--passphrase-file",
    type=file_type,
    metavar="FILE",
    help=f"Holds the passphrase of the authority's key; else ${PASSPHRASE_VARIABLE}, else it is asked for.",
)


def passphrase_of(file: Path | None, *, new: bool = False, whose: str = "the authority's key") -> bytes:
    """
    Return a passphrase from a file, the environment or the terminal.

    Raises:
        ConfigurationError: There is none.
    """
    if file is not None:
        return read_passphrase(file)
    if given := os.environ.get(PASSPHRASE_VARIABLE):
        return given.encode("utf-8")
    if not sys.stdin.isatty():
        raise ConfigurationError(f"no passphrase of {whose}: give --passphrase-file FILE or set {PASSPHRASE_VARIABLE}")
    return str(click.prompt(f"passphrase of {whose}", hide_input=True, confirmation_prompt=new, err=True)).encode()


def authority_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the argument DIR and ``--passphrase-file`` as an ``authority`` that is ready to sign."""

    @click.argument("directory", metavar="DIR", type=folder_type)
    @passphrase_option
    @functools.wraps(command)
    def with_authority(*args: Any, directory: Path, passphrase_file: Path | None, **kwargs: Any) -> Any:
        return command(*args, authority=AuthorityFolder.open(directory, passphrase_of(passphrase_file)), **kwargs)

    return with_authority


def read_input(path: Path) -> bytes:
    """
    Return what is in a file.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error


def new_files(*paths: Path) -> None:
    """
    Make sure that files can be written and are not there yet, before something is signed for them.

    Raises:
        InvalidInput: They are there, or their folder cannot be written.
    """
    for path in paths:
        if path.exists():
            raise InvalidInput(f"{path} is there already; move it away or choose another place with --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{path.parent}: {error.strerror}") from error
        if not os.access(path.parent, os.W_OK):
            raise InvalidInput(f"{path.parent} cannot be written")


def write_pair(path: Path, chain_pem: bytes, key_pem: bytes | None) -> list[str]:
    """
    Write a certificate with its chain and, if it was made here, its key (mode 600); return the files.

    Raises:
        InvalidInput: A file cannot be written; the certificate is on record all the same.
    """
    files = [(path.with_name(f"{path.name}.pem"), chain_pem, 0o644)]
    if key_pem is not None:
        files.insert(0, (path.with_name(f"{path.name}.key"), key_pem, 0o600))
    for file, content, mode in files:
        try:
            write_file(file, content, mode)
        except OSError as error:
            raise InvalidInput(f"{file}: {error.strerror}; the certificate is on record: revoke it") from error
    return [str(file) for file, _, _ in files]
