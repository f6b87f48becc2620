"""Settings: nothing is silently ignored, and no secret is shown."""

import math
from pathlib import Path

import annotated_types
import pytest

from authbackend.errors import ConfigurationError
from authbackend.secrets import read_dsn
from authbackend.service import components, replica
from authbackend.settings import Settings, load, setting_names, variable

DSN = "postgresql://service:hunter2@db/authbackend"


def test_every_setting_can_come_from_the_environment():
    settings = load(
        {
            "AUTHBACKEND_DATABASE__DSN": DSN,
            "AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:1",
            "AUTHBACKEND_ACCOUNTS__RESERVED": "ops,kick",
        }
    )
    assert settings.broker.listen == "127.0.0.1:1"
    assert settings.accounts.reserved == ("ops", "kick")
    assert read_dsn(settings.database) == DSN
    assert variable(("broker", "tls", "key_file")) == "AUTHBACKEND_BROKER__TLS__KEY_FILE"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("AUTHBACKEND_BROKER__LISTN", "AUTHBACKEND_BROKER__LISTEN"),
        ("AUTHBACKEND_DSN", "AUTHBACKEND_DATABASE__DSN"),
        ("AUTHBACKEND_BROKER_INSECURE", "AUTHBACKEND_BROKER__INSECURE"),
        ("AUTHBACKEND_BROKER__TLS__KEY", "AUTHBACKEND_BROKER__TLS__KEY_FILE"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(name, nearest):
    with pytest.raises(ConfigurationError, match=f"did you mean {nearest}"):
        load({name: "1"})


def test_the_file_is_read_and_the_environment_wins(tmp_path):
    file = tmp_path / "authbackend.toml"
    file.write_text('[broker]\nlisten = "127.0.0.1:1"\ndeny_reasons = true\n[accounts]\nreserved = ["a"]\n')
    settings = load({"AUTHBACKEND_BROKER__LISTEN": "127.0.0.1:2", "AUTHBACKEND_CONFIG": str(file)})
    assert settings.broker.listen == "127.0.0.1:2"
    assert settings.broker.deny_reasons
    assert settings.accounts.reserved == ("a",)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[broker]\nlissen = 1", "unknown setting broker.lissen; did you mean broker.listen"),
        ("[borker]\nlisten = 'x'", "unknown setting borker"),
        ("nonsense", "is not TOML"),
        ("[broker]\nlisten = 'here'", "host:port"),
        ("[broker]\nrequest_timeout_s = 'soon'", "AUTHBACKEND_BROKER__REQUEST_TIMEOUT_S"),
        ("[broker]\nkeepalive_timeout_s = 5", "greater than or equal to 120"),
    ],
)
def test_faults_of_a_file_are_told(tmp_path, text, fault):
    file = tmp_path / "x.toml"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=fault):
        load({}, file)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot read the configuration file"):
        load({}, tmp_path / "nowhere.toml")


def test_without_a_database_the_two_ways_are_named():
    with pytest.raises(ConfigurationError, match=r"(?s)AUTHBACKEND_DATABASE__DSN.*--embedded"):
        replica.target(load({}))


def test_a_secret_is_in_no_repr_and_no_error():
    settings = load({"AUTHBACKEND_DATABASE__DSN": DSN})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in repr(replica.target(settings))
    with pytest.raises(ConfigurationError) as refused:
        load({"AUTHBACKEND_DATABASE__DSN": DSN, "AUTHBACKEND_BROKER__LISTEN": "nonsense"})
    assert "hunter2" not in str(refused.value)


def test_the_password_can_come_from_a_file(tmp_path):
    file = tmp_path / "password"
    file.write_text("p@ss/word\n")
    settings = load(
        {"AUTHBACKEND_DATABASE__DSN": "postgresql://role@db:5432/x", "AUTHBACKEND_DATABASE__PASSWORD_FILE": str(file)}
    )
    assert read_dsn(settings.database) == "postgresql://role:p%40ss%2Fword@db:5432/x"


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080", "authbackend:8080"])
def test_a_listener_beyond_loopback_needs_mutual_tls(listen):
    with pytest.raises(ConfigurationError, match="mutual TLS"):
        components.broker_tls(load({"AUTHBACKEND_BROKER__LISTEN": listen}).broker)
    insecure = load({"AUTHBACKEND_BROKER__LISTEN": listen, "AUTHBACKEND_BROKER__INSECURE": "true"})
    assert components.broker_tls(insecure.broker) is None


def test_tls_without_client_certificates_is_not_enough(tmp_path):
    settings = load(
        {
            "AUTHBACKEND_BROKER__LISTEN": "0.0.0.0:8080",
            "AUTHBACKEND_BROKER__TLS__CERTIFICATE_FILE": "a.pem",
            "AUTHBACKEND_BROKER__TLS__KEY_FILE": "a.key",
        }
    )
    with pytest.raises(ConfigurationError, match="client_ca_file"):
        components.broker_tls(settings.broker)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"CERTIFICATE_FILE": "a.pem"}, "health.tls.certificate_file and health.tls.key_file go together"),
        ({"KEY_FILE": "a.key"}, "health.tls.certificate_file and health.tls.key_file go together"),
        ({"CLIENT_CA_FILE": "ca.pem"}, "health.tls.client_ca_file needs health.tls.certificate_file"),
        ({"CERTIFICATE_FILE": "a.pem", "KEY_FILE": "a.key"}, "health.tls: cannot read a.pem: No such file"),
    ],
)
def test_half_of_the_files_for_health_over_tls_is_refused(files, fault):
    settings = load({f"AUTHBACKEND_HEALTH__TLS__{name}": value for name, value in files.items()})
    with pytest.raises(ConfigurationError, match=fault):
        components.health_tls(settings.health)


def test_health_is_answered_without_tls_unless_that_is_set():
    assert components.health_tls(load({"AUTHBACKEND_HEALTH__LISTEN": "0.0.0.0:8082"}).health) is None


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.9.9.9:1"])
def test_loopback_needs_none(listen):
    assert components.broker_tls(load({"AUTHBACKEND_BROKER__LISTEN": listen}).broker) is None


def field_of(path):
    """Return the field of a setting, for example of ("broker", "backlog")."""
    model = Settings
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    return model.model_fields[path[-1]]


def value_of(settings, path):
    """Return the value of a setting."""
    for part in path:
        settings = getattr(settings, part)
    return settings


EVERY = pytest.mark.parametrize("path", list(setting_names()), ids=".".join)
NUMBERS = [path for path in setting_names() if field_of(path).annotation in (int, float)]


@EVERY
def test_every_setting_has_a_description(path):
    assert field_of(path).description


@EVERY
@pytest.mark.parametrize("nothing", ["", " "])
def test_empty_is_unset(path, nothing, tmp_path):
    """In the file, and in the environment, where it does not override the file."""
    default = value_of(load({}), path)
    assert value_of(load({variable(path): nothing}), path) == default
    file = tmp_path / "x.toml"
    file.write_text(f"[{'.'.join(path[:-1])}]\n{path[-1]} = '{nothing}'\n")
    assert value_of(load({}, file), path) == default


def test_an_empty_variable_hides_no_value_of_the_file(tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[registry]\nsnapshot_dir = '/var/lib/x'\n[accounts]\nreserved = ['a', '']\n")
    settings = load({"AUTHBACKEND_REGISTRY__SNAPSHOT_DIR": "", "AUTHBACKEND_ACCOUNTS__RESERVED": ""}, file)
    assert settings.registry.snapshot_dir == Path("/var/lib/x")
    assert settings.accounts.reserved == ("a",)


def test_empty_entries_of_a_list_are_none(tmp_path):
    assert load({"AUTHBACKEND_ACCOUNTS__RESERVED": "ops, kick,,"}).accounts.reserved == ("ops", "kick")
    file = tmp_path / "x.toml"
    file.write_text("[enforcement]\nsweep_closes = []\n")
    assert load({}, file).enforcement.sweep_closes == ()


@pytest.mark.parametrize("path", NUMBERS, ids=".".join)
def test_every_number_has_bounds(path):
    bounds = field_of(path).metadata
    low = next(bound.ge for bound in bounds if isinstance(bound, annotated_types.Ge))
    high = next(bound.le for bound in bounds if isinstance(bound, annotated_types.Le))
    for within in (low, high):
        assert value_of(load({variable(path): str(within)}), path) == within
    for beyond in (low - 1, high + 1, math.inf, -math.inf, math.nan, 10**400):
        with pytest.raises(ConfigurationError, match=variable(path)):
            load({variable(path): str(beyond)})


def test_no_number_is_left_out():
    assert ("broker", "backlog") in NUMBERS
    others = {field_of(path).annotation for path in setting_names() if path not in NUMBERS}
    assert not [kind for kind in others if "int" in str(kind) or "float" in str(kind)]


@pytest.mark.parametrize(
    "link",
    [
        "AUTHBACKEND_SERVICE_HOST=10.0.0.11",
        "AUTHBACKEND_SERVICE_PORT=8080",
        "AUTHBACKEND_SERVICE_PORT_HTTPS_AUTH=8443",
        "AUTHBACKEND_PORT=tcp://10.0.0.11:8080",
        "AUTHBACKEND_PORT_8080_TCP=tcp://10.0.0.11:8080",
        "AUTHBACKEND_PORT_8080_TCP_PROTO=tcp",
        "AUTHBACKEND_PORT_8080_TCP_PORT=8080",
        "AUTHBACKEND_PORT_8080_TCP_ADDR=10.0.0.11",
        "AUTHBACKEND_ADMIN_SERVICE_HOST=10.0.0.12",
        "AUTHBACKEND_ADMIN_PORT=udp://10.0.0.12:8081",
        "AUTHBACKEND_NAME=/rabbitmq/authbackend",
        "AUTHBACKEND_ENV_LISTEN_PORT=8080",
    ],
)
def test_variables_of_a_service_of_this_name_are_left_alone(link):
    name, _, value = link.partition("=")
    assert load({name: value}) == load({})


@pytest.mark.parametrize(
    "setting",
    [
        "AUTHBACKEND_BROKER_PORT=8080",
        "AUTHBACKEND_REPLICA_NAME=north",
        "AUTHBACKEND_BROKER__SERVICE_HOST=north",
        "AUTHBACKEND_DATABASE_HOST=db",
        "AUTHBACKEND_BROKER__LISTN=",
    ],
)
def test_what_a_person_meant_as_a_setting_is_refused_all_the_same(setting):
    name, _, value = setting.partition("=")
    with pytest.raises(ConfigurationError, match=f"unknown setting {name}; did you mean"):
        load({name: value})


@pytest.mark.parametrize("port", ["", "65536", "-1", "+1", "²", "８０", "1e3", " 1"])
def test_a_port_is_a_number(port):
    with pytest.raises(ConfigurationError, match="write it as host:port"):
        load({"AUTHBACKEND_BROKER__LISTEN": f"127.0.0.1:{port}"})
