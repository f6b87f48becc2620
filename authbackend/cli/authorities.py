"""Shared by commands that sign: the authority's folder and its passphrase."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from authbackend.certificates.crl_publisher import read_passphrase
from authbackend.errors import ConfigurationError, InvalidInput
from authbackend.pki.ca import AuthorityFolder
from authbackend.pki.files import write_file

folder_type = click.Path(file_okay=False, path_type=Path)
file_type = click.Path(dir_okay=False, path_type=Path)


class KeyOwner(NamedTuple):
    """The key a passphrase belongs to, and where the passphrase may come from."""

    name: str
    option: str
    variable: str

    @property
    def file_variable(self) -> str:
        """The variable that names a file with the passphrase."""
        return f"{self.variable}_FILE"


SIGNING_KEY = KeyOwner("the authority's key", "--passphrase-file", "AUTHBACKEND_CA_PASSPHRASE")
ROOT_KEY = KeyOwner("the root's key", "--root-passphrase-file", "AUTHBACKEND_CA_ROOT_PASSPHRASE")

passphrase_option = click.option(
    SIGNING_KEY.option,
    type=file_type,
    metavar="FILE",
    help=f"Read the passphrase of {SIGNING_KEY.name} from FILE. Without it: ${SIGNING_KEY.variable}, then the file named by "
    f"${SIGNING_KEY.file_variable}, then a prompt.",
)
root_passphrase_option = click.option(
    ROOT_KEY.option,
    type=file_type,
    metavar="FILE",
    help=f"Read the passphrase of {ROOT_KEY.name}, which must be another one, from FILE. Without it: ${ROOT_KEY.variable}, then "
    f"the file named by ${ROOT_KEY.file_variable}, then a prompt.",
)


def passphrase_of(file: Path | None, *, new: bool = False, key: KeyOwner = SIGNING_KEY) -> bytes:
    """
    Return a passphrase from a file, the environment or the terminal.

    Raises:
        ConfigurationError: None of them has one.
    """
    passphrase = given_passphrase(file, new=new, key=key)
    if passphrase is None:
        raise ConfigurationError(
            f"no passphrase of {key.name}: give {key.option} FILE or set {key.variable} or {key.file_variable}"
        )
    return passphrase


def given_passphrase(file: Path | None, *, new: bool = False, key: KeyOwner = SIGNING_KEY) -> bytes | None:
    """
    Return a passphrase as :func:`passphrase_of` does, or None if there is none and no terminal to prompt at.

    Raises:
        ConfigurationError: The file cannot be read or is empty.
    """
    if file is not None:
        return read_passphrase(file)
    if given := os.environ.get(key.variable):
        return given.encode("utf-8")
    if path := os.environ.get(key.file_variable):
        return read_passphrase(Path(path))
    if not sys.stdin.isatty():
        return None
    return str(click.prompt(f"passphrase of {key.name}", hide_input=True, confirmation_prompt=new, err=True)).encode()


def authority_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument DIR and ``--passphrase-file`` to a command, which gets an ``authority`` that is ready to sign."""

    @click.argument("directory", metavar="DIR", type=folder_type)
    @passphrase_option
    @functools.wraps(command)
    def with_authority(*args: Any, directory: Path, passphrase_file: Path | None, **kwargs: Any) -> Any:
        return command(*args, authority=AuthorityFolder.open(directory, passphrase_of(passphrase_file)), **kwargs)

    return with_authority


def read_input(path: Path) -> bytes:
    """
    Return a file's contents.

    Raises:
        InvalidInput: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}") from error


def new_files(*paths: Path) -> None:
    """
    Check, before signing, that files do not exist yet and can be written.

    Raises:
        InvalidInput: A file exists, or its folder cannot be written.
    """
    for path in paths:
        if path.exists():
            raise InvalidInput(f"{path} already exists; move it away or choose another place with --out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"{path.parent}: {error.strerror}") from error
        if not os.access(path.parent, os.W_OK):
            raise InvalidInput(f"cannot write to {path.parent}")


def write_pair(path: Path, chain_pem: bytes, key_pem: bytes | None) -> list[str]:
    """
    Write a certificate with its chain and, if it was generated here, its key (mode 600); return the file names.

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
