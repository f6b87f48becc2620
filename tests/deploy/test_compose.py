"""docker-compose.yml: every container is held as tightly as the replicas, and a command starts nothing."""

import os
import re
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).parent.parent.parent
PROJECT = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES = PROJECT["services"]
ENDS_BY_ITSELF = {"migrate", "database-roles", "admin"}
"""Have nothing to check: they do one thing and end."""

NEEDED = {
    # to read the host's files, give them to the user rabbitmq, and become that user
    "rabbitmq": {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"},
    # to give the volume to the user postgres, and become that user
    "postgres": {"CHOWN", "DAC_READ_SEARCH", "FOWNER", "SETGID", "SETUID"},
}


def bytes_of(size):
    number, unit = re.fullmatch(r"(\d+)([kmg])b?", size).groups()
    return int(number) * 1024 ** ("kmg".index(unit) + 1)


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert set(service.get("cap_add", ())) == NEEDED.get(name.rstrip("123"), set())
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert 0 < service["pids_limit"] <= 2048
    assert 0 < bytes_of(service["mem_limit"]) <= 2 * 1024**3
    assert bytes_of(service.get("shm_size", "64mb")) < bytes_of(service["mem_limit"]), "shared memory counts as memory"


@pytest.mark.parametrize("name", SERVICES)
def test_the_log_of_every_container_is_bounded(name):
    logging = SERVICES[name]["logging"]
    assert logging["driver"] == "json-file"
    assert {"max-size", "max-file"} <= set(logging["options"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_that_stays_is_checked_and_started_again(name):
    service = SERVICES[name]
    if name in ENDS_BY_ITSELF:
        assert service["healthcheck"] == {"disable": True}
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    by_the_image = service["image"] == "authbackend:local" and service.get("command", ["serve"]) == ["serve"]
    assert by_the_image or service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    if not by_the_image:
        assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])


def test_only_haproxy_and_prometheus_can_be_reached_from_outside():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"haproxy": ["8883:8883", "127.0.0.1:15671:15671"], "prometheus": ["127.0.0.1:9090:9090"]}


def test_a_command_starts_no_other_container():
    assert SERVICES["admin"]["depends_on"] == []


def test_the_key_that_signs_certificates_is_where_it_is_used_only():
    has_key = {name for name, service in SERVICES.items() if any("/pki" in each for each in service.get("volumes", ()))}
    assert has_key == {"admin", "crl-signer"}
    assert {name for name in SERVICES if "ca-passphrase" in SERVICES[name].get("secrets", ())} == has_key


@pytest.mark.parametrize("number", "123")
def test_each_node_has_a_list_of_its_own_of_which_only_its_sync_knows(number):
    lists = f"crl{number}"
    users = {
        name: volume.removeprefix(f"{lists}:")
        for name, service in SERVICES.items()
        for volume in service.get("volumes", ())
        if volume.startswith(f"{lists}:")
    }
    assert users == {f"rabbitmq{number}": "/deploy/crl", f"crl-sync{number}": "/crl"}
    sync = SERVICES[f"crl-sync{number}"]
    assert (
        sync["command"][sync["command"].index("--node") + 1]
        == SERVICES[f"rabbitmq{number}"]["environment"]["RABBITMQ_NODENAME"]
    )
    assert sync["profiles"] == SERVICES["crl-signer"]["profiles"] == ["revocation"]
    # The database accepts reports of one node from one role.
    role = f"crl_rabbitmq{number}"
    assert f"//{role}@" in sync["environment"]["AUTHBACKEND_DATABASE__DSN"]
    assert f"alter role {role} password :'{role}';" in (REPO / "deploy" / "database-roles").read_text(encoding="utf-8")


def test_every_file_that_is_mounted_is_in_the_checkout_or_made_by_prepare():
    """A mount of a file that is not there becomes an empty folder, owned by root."""
    mounts = {volume.split(":")[0] for s in SERVICES.values() for volume in s.get("volumes", ()) if volume[0] == "."}
    mounts |= {secret["file"] for secret in PROJECT["secrets"].values()}
    prepare = (REPO / "deploy" / "prepare").read_text(encoding="utf-8")
    for mount in mounts:
        made = mount.removeprefix("./deploy/secrets/")
        if made == mount:
            assert (REPO / mount).exists(), mount
        else:
            assert re.search(rf"\b(password|put \d+|authority) {made.removeprefix('pki/')}\b", prepare), mount


def test_the_scripts_can_be_executed():
    for script in ("prepare", "database-roles", "rabbitmq-start"):
        assert os.access(REPO / "deploy" / script, os.X_OK), script
