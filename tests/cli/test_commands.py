"""The command line as people and scripts use it: output, JSON, exit status, and the audit trail."""

import json
import re

import pytest
from click.testing import CliRunner

from authbackend.cli import main
from tests.support.postgres import connected, run

POLICY = """\
schema: authbackend/1
device_types:
  APM:
    client_ids: ["{device_id}", "{device_id}_*"]
    vhosts: ["/"]
    networks: ["10.0.0.0/8"]
    rules:
      - {effect: allow, action: publish, topic: "fleet/{device_id}/#", note: "ticket 1"}
      - {effect: deny, action: publish, topic: "fleet/{device_id}/raw/#"}
devices:
  - {device_id: D1, type: APM, attributes: {site: "hamburg"}}
  - {device_id: D2, type: APM, common_name: "two", rules: [{effect: allow, action: subscribe, topic: "news"}]}
accounts:
  - {name: ops, login: password, tags: [monitoring], vhosts: ["/"]}
"""


@pytest.fixture
def cli(dsn, tmp_path, monkeypatch):
    """Run a command and return click's result."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHBACKEND_CONFIG", "AUTHBACKEND_ACTOR"):
        monkeypatch.delenv(name, raising=False)
    environment = {"AUTHBACKEND_DATABASE__DSN": dsn, "AUTHBACKEND_ACTOR": "alice"}

    def call(*arguments, exit_code=0, stdin=None, **changed):
        result = CliRunner().invoke(main, [*map(str, arguments)], env={**environment, **changed}, input=stdin)
        assert result.exit_code == exit_code, (result.output, result.stderr, result.exception)
        return result

    return call


@pytest.fixture
def policy(cli, tmp_path):
    """The file of POLICY, which has been applied."""
    file = tmp_path / "policy.yaml"
    file.write_text(POLICY)
    cli("policy", "apply", file)
    return file


def rows(dsn, query):
    async def fetch():
        async with connected(dsn) as connection:
            return [dict(row) for row in await connection.fetch(query)]

    return run(fetch())


async def execute(dsn, statement):
    async with connected(dsn) as connection:
        await connection.execute(statement)


def test_apply_is_exact_and_repeatable(cli, policy, dsn):
    again = cli("policy", "apply", policy, "--json")
    assert json.loads(again.stdout) == {"version": None, "impact": None, "changes": []}
    assert {(row["actor"], row["claimed_by"]) for row in rows(dsn, "select actor, claimed_by from audit")} == {
        ("postgres", "alice")
    }


def test_plan_tells_every_difference_and_changes_nothing(cli, policy, dsn):
    policy.write_text(POLICY.replace("ticket 1", "ticket 2").replace("hamburg", "kiel").replace("news", "olds"))
    before = rows(dsn, "select count(*) from audit")
    lines = cli("policy", "plan", policy).stdout.splitlines()
    assert lines[0].startswith(
        "impact: something is taken from 1 devices, accounts or certificates: 1 whose rules are narrowed (D2); "
    )
    assert set(lines[1:]) == {
        '~ device D1: attributes: {"site": "hamburg"} -> {"site": "kiel"}',
        '~ rule device_type APM: allow publish fleet/{device_id}/#: note: "ticket 1" -> "ticket 2"',
        "- rule device_id D2: allow subscribe news",
        "+ rule device_id D2: allow subscribe olds",
        "4 changes",
    }
    assert rows(dsn, "select count(*) from audit") == before


def test_the_impact_comes_first_and_says_how_to_go_on(cli, policy, dsn):
    run(execute(dsn, "update brake set devices = 1, percent = 0"))
    policy.write_text(
        POLICY.replace("type: APM,", "type: APM, status: revoked,").replace('vhosts: ["/"]}', "vhosts: []}")
    )
    impact = "impact: something is taken from 3 devices, accounts or certificates: 2 revoked (D1, D2), 1 account narrowed (ops); the limit is 1, or 0 % of 2 devices"
    way_on = "more than the limit is refused unless it is meant: policy apply with --accept-impact 3"
    assert cli("policy", "plan", policy).stdout.splitlines()[:2] == [impact, way_on]
    assert json.loads(cli("policy", "plan", policy, "--json").stdout)["impact"] == {
        "touched": 3,
        "registered": 2,
        "devices": 1,
        "percent": 0.0,
        "beyond_limit": True,
        "causes": [
            {"kind": "device", "cause": "revoked", "number": 2, "names": ["D1", "D2"]},
            {"kind": "account", "cause": "narrowed", "number": 1, "names": ["ops"]},
        ],
    }
    refused = cli("policy", "apply", policy, exit_code=2)
    assert refused.stdout == ""
    assert refused.stderr == f"authbackend: nothing was changed: {impact}; {way_on}\n"
    assert "; 2 were accepted; more than" in cli("policy", "apply", policy, "--accept-impact", 2, exit_code=2).stderr
    lines = cli("policy", "apply", policy, "--accept-impact", 3).stdout.splitlines()
    assert lines[0] == impact
    assert lines[-1].startswith("applied 3 changes")


def test_a_plan_that_the_database_would_refuse_is_printed_and_ends_as_the_apply(cli, policy):
    policy.write_text(POLICY.replace("name: ops", "name: two"))
    planned = cli("policy", "plan", policy, exit_code=2)
    assert planned.stdout.splitlines()[-1] == "1 changes"
    assert "account 'two' has the common name of device 'D2'" in planned.stderr
    assert planned.stderr == cli("policy", "apply", policy, exit_code=2).stderr


def test_export_then_apply_changes_nothing(cli, policy, tmp_path):
    cli("account", "passwd", "ops", "--password-file", "-", stdin="correct horse\n")
    cli("policy", "export", "-o", tmp_path / "out.yaml")
    assert (tmp_path / "out.yaml").stat().st_mode & 0o777 == 0o600
    result = json.loads(cli("policy", "plan", tmp_path / "out.yaml", "--prune", "--json").stdout)
    assert result == {"impact": None, "changes": []}
    (tmp_path / "out.json").write_text(cli("policy", "export", "--json").stdout)  # JSON is YAML
    assert json.loads(cli("policy", "plan", tmp_path / "out.json", "--prune", "--json").stdout)["changes"] == []


def test_nothing_is_removed_without_prune(cli, policy):
    policy.write_text(
        "schema: authbackend/1\ndevices:\n  - {device_id: D1, type: APM, attributes: {site: hamburg}}\naccounts: []\n"
    )
    assert json.loads(cli("policy", "apply", policy, "--json").stdout)["changes"] == []
    pruned = cli("policy", "apply", policy, "--prune").stdout
    assert "- device D2" in pruned
    assert "- account ops" in pruned
    assert "device_type" not in pruned.replace("device_type APM:", "")
    assert [row["device_id"] for row in json.loads(cli("device", "list", "--json").stdout)] == ["D1"]


def test_a_file_with_errors_changes_nothing(cli, policy, dsn):
    policy.write_text(POLICY.replace("fleet/{device_id}/raw/#", "fleet/*/raw").replace("D1", "D9"))
    result = cli("policy", "apply", policy, exit_code=2)
    assert "policy.yaml:9:" in result.stderr
    assert "nothing was changed" in result.stderr
    assert rows(dsn, "select device_id from device where device_id = 'D9'") == []


def test_a_file_can_come_by_standard_input(cli, policy):
    text = policy.read_text()
    assert (
        "1 errors"
        in cli("policy", "check", "-", stdin=text.replace("fleet/{device_id}/raw/#", "fleet/*/raw"), exit_code=2).stdout
    )
    refused = cli("policy", "apply", "-", stdin=text.replace("fleet/{device_id}/raw/#", "fleet/*/raw"), exit_code=2)
    assert "standard input:9:" in refused.stderr
    assert "~ device D1" in cli("policy", "plan", "-", stdin=text.replace("hamburg", "kiel")).stdout
    cli("policy", "apply", "-", stdin=text.replace("hamburg", "kiel"))
    assert json.loads(cli("device", "show", "D1", "--json").stdout)["attributes"] == {"site": "kiel"}


def test_what_only_the_database_can_refuse_is_all_or_nothing(cli, policy, dsn):
    policy.write_text(POLICY.replace("name: ops", "name: two"))
    result = cli("policy", "apply", policy, exit_code=2)
    assert "account 'two' has the common name of device 'D2'" in result.stderr
    policy.write_text(POLICY.replace("type: APM, common", "type: NOPE, common").replace("hamburg", "kiel"))
    assert "NOPE" in cli("policy", "apply", policy, exit_code=4).stderr
    assert rows(dsn, "select attributes->>'site' as site from device where device_id = 'D1'") == [{"site": "hamburg"}]


def test_a_file_never_reinstates_by_forgetting(cli, policy):
    cli("device", "revoke", "D1", "--reason", "stolen")
    assert json.loads(cli("policy", "apply", policy, "--json").stdout)["changes"] == []
    assert json.loads(cli("device", "show", "D1", "--json").stdout)["status"] == "revoked"


def test_names_can_change_hands_in_one_apply(cli, policy):
    text = POLICY.replace("device_id: D1, type: APM", "device_id: D1, type: APM, common_name: two").replace(
        'type: APM, common_name: "two"', "type: APM, common_name: D1"
    )
    policy.write_text(text)
    assert "2 changes" in cli("policy", "apply", policy).stdout
    assert json.loads(cli("device", "show", "D2", "--json").stdout)["common_name"] == "D1"
    policy.write_text(text.replace("common_name: D1", "common_name: two"))
    assert "same common name two" in cli("policy", "apply", policy, exit_code=2).stderr


def test_check_needs_no_database(cli, policy):
    result = cli("policy", "check", policy, AUTHBACKEND_DATABASE__DSN="postgresql://nobody@/none?host=/nonexistent")
    assert "0 errors" in result.stdout
    policy.write_text("schema: authbackend/1\ndevices: [{device_id: '#', type: APM}]\n")
    result = json.loads(cli("policy", "check", policy, "--json", exit_code=2).stdout)
    assert (result["problems"][0]["line"], result["errors"]) == (2, 1)


def test_devices_from_a_file_of_their_own(cli, policy, tmp_path):
    types = tmp_path / "types.yaml"
    types.write_text("schema: authbackend/1\n")
    devices = tmp_path / "devices.csv"
    devices.write_text("device_id,type,attr.site\n" + "".join(f"B{n},APM,kiel\n" for n in range(5000)))
    assert "applied 5000 changes" in cli("policy", "apply", types, "--devices", devices).stdout
    assert "nothing to change" in cli("policy", "apply", types, "--devices", devices).stdout
    both = cli("policy", "apply", policy, "--devices", devices, exit_code=2)
    assert "exclude each other" in both.stderr


def test_the_life_of_a_device(cli, policy, dsn):
    added = json.loads(
        cli("device", "add", "D3", "--type", "APM", "--attribute", "site=kiel", "--status", "pending", "--json").stdout
    )
    assert added["status"] == "pending"
    assert re.fullmatch(r"[0-9]+@[0-9a-f]{8}", added["version"])
    cli("device", "reinstate", "D3")
    cli("device", "suspend", "D3", "--reason", "service")
    assert "is suspended already" in cli("device", "suspend", "D3", "--reason", "again").stdout
    cli("device", "revoke", "D3", "--reason", "stolen")
    cli("device", "suspend", "D3", "--reason", "x", exit_code=4)
    shown = json.loads(cli("device", "show", "D3", "--json").stdout)
    assert (shown["status"], shown["status_reason"], shown["attributes"]) == ("revoked", "stolen", {"site": "kiel"})
    trail = rows(
        dsn,
        "select after->>'status' as status, claimed_by from audit where entity = 'device' and key = 'D3' order by id",
    )
    assert [row["status"] for row in trail] == ["pending", "active", "suspended", "revoked"]
    listed = json.loads(cli("device", "list", "--status", "revoked", "--json").stdout)
    assert [device["device_id"] for device in listed] == ["D3"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (("device", "show", "nobody"), 3, "no device has the id or common name"),
        (("device", "revoke", "nobody", "--reason", "x"), 3, "no device has the id"),
        (("device", "add", "D 4", "--type", "APM"), 2, "1 to 64 letters"),
        (("device", "add", "D1", "--type", "APM"), 4, "already exists"),
        (("device", "add", "D4", "--type", "NOPE"), 4, "NOPE"),
        (("device", "add", "D4", "--type", "APM", "--attribute", "site"), 2, "NAME=VALUE"),
        (("device", "add", "D4", "--type", "APM", "--expires", "soon"), 2, "2027"),
        (("account", "passwd", "nobody", "--password-file", "-"), 3, "no account is named"),
        (("account", "add", "D1", "--password-file", "-"), 2, "common name of device"),
        (("account", "add", "a", "--login", "certificate", "--password-file", "-"), 2, "has no password"),
        (("explain", "nobody", "publish", "x"), 3, "no device has"),
        (("explain", "D1", "publish", "x"), 6, ""),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_exit_codes_and_messages(cli, policy, arguments, exit_code, text):
    result = cli(*arguments, exit_code=exit_code, stdin="correct horse\n")
    assert text in result.stderr + result.stdout
    assert "Traceback" not in result.stderr


def test_an_unreachable_database_is_exit_code_5_and_shows_no_secret(cli):
    result = cli("device", "list", exit_code=5, AUTHBACKEND_DATABASE__DSN="postgresql://u:hunter2@127.0.0.1:1/x")
    assert "cannot be reached" in result.stderr
    assert "hunter2" not in result.stderr


def test_a_database_without_the_registry_says_what_to_run(cli, postgres):
    result = cli("device", "list", exit_code=5, AUTHBACKEND_DATABASE__DSN=postgres.dsn("postgres"))
    assert "authbackend migrate" in result.stderr
    result = cli("serve", exit_code=2, AUTHBACKEND_DATABASE__DSN=postgres.dsn("postgres"))
    assert "authbackend migrate" in result.stderr


def test_serve_without_a_database_names_the_two_ways(cli):
    result = cli("serve", exit_code=2, AUTHBACKEND_DATABASE__DSN=None)
    assert "AUTHBACKEND_DATABASE__DSN" in result.stderr
    assert "--embedded" in result.stderr


def test_accounts(cli, policy, dsn):
    cli(
        "account",
        "add",
        "svc",
        "--tag",
        "management",
        "--vhost",
        "/",
        "--read",
        "app.*",
        "--password-file",
        "-",
        stdin="correct horse\n",
    )
    cli("account", "add", "short", "--password-file", "-", stdin="short\n", exit_code=2)
    listed = json.loads(cli("account", "list", "--json").stdout)
    svc = next(account for account in listed if account["name"] == "svc")
    assert (svc["password_set"], svc["tags"], svc["read"]) == (True, ["management"], ["app.*"])
    assert "argon2" not in cli("account", "list").stdout
    stored = rows(dsn, "select password_hash from account where name = 'svc'")[0]["password_hash"]
    assert stored.startswith("$argon2id$")
    cli("account", "passwd", "svc", "--password-file", "-", stdin="another horse\n")
    assert rows(dsn, "select password_hash from account where name = 'svc'")[0]["password_hash"] != stored
    assert not [row for row in rows(dsn, "select before, after from audit") if "argon2id" in str(row)]


def test_explain_says_what_decides_and_what_is_missing(cli, policy):
    allowed = cli("explain", "D1", "publish", "fleet/D1/x").stdout
    assert allowed.startswith("ALLOW: device D1")
    assert "allow publish fleet/{device_id}/#" in allowed
    denied = json.loads(cli("explain", "D1", "publish", "fleet/D2/x", "--json", exit_code=6).stdout)
    assert denied["nearest"][0]["missing"] == 'level 2 is "D2", the rule wants "D1"'
    by_rule = cli("explain", "D1", "publish", "fleet/D1/raw/x", exit_code=6).stdout
    assert "rule_denies" in by_rule
    assert "deny publish fleet/{device_id}/raw/#" in by_rule
    by_client = cli("explain", "two", "subscribe", "news", "--client-id", "D1", exit_code=6).stdout
    assert "client_id_not_bound" in by_client
    assert cli("explain", "two", "subscribe", "news").stdout.startswith("ALLOW: device D2")
    by_address = cli("explain", "D1", "publish", "fleet/D1/x", "--address", "192.0.2.1", exit_code=6).stdout
    assert "address_not_in_networks" in by_address


def test_a_client_id_that_belongs_to_another_device_is_explained(cli, policy):
    cli("device", "add", "D1_2", "--type", "APM")
    denied = cli("explain", "D1", "publish", "fleet/D1/x", "--client-id", "D1_2_a", exit_code=6).stdout
    assert "client_id_of_another_device" in denied


def test_settings_can_come_from_a_file(cli, policy, tmp_path, dsn):
    file = tmp_path / "authbackend.toml"
    file.write_text(f'[database]\ndsn = "{dsn}"\n')
    cli("--config", file, "device", "list", AUTHBACKEND_DATABASE__DSN=None)
    file.write_text('[database]\ndns = "x"\n')
    result = cli("--config", file, "device", "list", exit_code=2, AUTHBACKEND_DATABASE__DSN=None)
    assert "did you mean database.dsn" in result.stderr


def test_devices_from_a_file_leave_alone_what_the_file_cannot_say(cli, policy, tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("schema: authbackend/1\n")
    devices = tmp_path / "devices.csv"
    devices.write_text("device_id,common_name,type\nD1,,APM\nD2,two,APM\n")
    assert "nothing to change" in cli("policy", "apply", empty, "--devices", devices).stdout
    shown = json.loads(cli("device", "show", "D2", "--json").stdout)
    assert [rule["topic"] for rule in shown["rules"] if rule["of"] == "device"] == ["news"]


def test_an_account_can_change_to_login_by_certificate(cli, policy):
    cli("account", "passwd", "ops", "--password-file", "-", stdin="correct horse\n")
    policy.write_text(POLICY.replace("login: password", "login: certificate"))
    cli("policy", "apply", policy)
    found = json.loads(cli("account", "list", "--json").stdout)[0]
    assert (found["login"], found["password_set"]) == ("certificate", False)


def test_explain_takes_the_owner_of_the_usual_client_id_into_account(cli, policy):
    """Like the listener: D1's usual client id would be D1_1, which is another device's id."""
    policy.write_text(POLICY.replace('client_ids: ["{device_id}", "{device_id}_*"]', 'client_ids: ["{device_id}_*"]'))
    cli("policy", "apply", policy)
    cli("device", "add", "D1_1", "--type", "APM")
    denied = json.loads(cli("explain", "D1", "publish", "fleet/D1/x", "--json", exit_code=6).stdout)
    assert denied["reason"] == "client_id_of_another_device"


def test_what_is_stored_cannot_drive_a_terminal(cli, policy):
    cli("device", "suspend", "D1", "--reason", "\x1b[31mred")
    for command in (("device", "show", "D1"), ("device", "list")):
        assert "\x1b" not in cli(*command).stdout
