"""The policy file: it is parsed exactly, and each problem is reported with line and column."""

import pytest

from authbackend.policy_file.devices import read_devices
from authbackend.policy_file.lint import lint
from authbackend.policy_file.read import read
from authbackend.policy_file.write import write

GOOD = """\
schema: authbackend/1
device_types:
  APM:
    description: mover
    client_ids: ["{device_id}", "{device_id}_*"]
    vhosts: ["/"]
    networks: ["10.20.0.0/16", "::1/128"]
    rules:
      - {effect: allow, action: publish, topic: "fleet/{device_id}/#"}
      - {effect: deny, action: subscribe, topic: "fleet/+/secrets/#", note: "x"}
devices:
  - device_id: APM0001
    common_name: apm one
    type: APM
    status: suspended
    attributes: {site: hamburg, line: "7"}
    expires_at: 2027-01-31T12:00:00Z
    rules:
      - {effect: allow, action: subscribe, topic: "fleet/broadcast"}
accounts:
  - name: machine
    login: certificate
    vhosts: ["/"]
    permissions: {configure: ["app.*"], write: ["app.*"], read: []}
    rules:
      - {effect: allow, action: publish, topic: "app/#", exchange: events}
"""


def test_a_good_file_has_no_problem_and_survives_writing():
    document, problems = read(GOOD, "f.yaml")
    assert problems == []
    again, problems = read(write(document), "g.yaml")
    assert problems == []
    assert again == document


@pytest.mark.parametrize(
    ("old", "new", "where", "fault"),
    [
        ("schema: authbackend/1\n", "", "1:1", "schema is missing"),
        ("authbackend/1", "authbackend/9", "1:9", "reads schema authbackend/1"),
        ("description: mover", "descripton: mover", "4:5", "did you mean description"),
        ('"{device_id}_*"', '"{device_id}*"', "5:33", "separator"),
        ('"10.20.0.0/16"', '"10.20.0.1/16"', "7:16", "CIDR"),
        ("effect: allow, action: publish", "effect: permit, action: publish", "9:18", "allow or deny"),
        ('"fleet/{device_id}/#"', '"fleet/*/#"', "9:49", '"*" is not possible'),
        ('"fleet/{device_id}/#"', '"fleet/{nope}/#"', "9:49", "unknown"),
        ("device_id: APM0001", "device_id: APM 0001", "12:16", "letters"),
        ("common_name: apm one", 'common_name: "a,b"', "13:18", "joins"),
        ("status: suspended", "status: off", "15:13", "this must be text"),
        ("status: suspended", "status: gone", "15:13", "must be one of: pending"),
        ('line: "7"', "line: 7", "16:39", "put it in quotes"),
        ("2027-01-31T12:00:00Z", "soon", "17:17", "is not a time"),
        ("login: certificate", "login: token", "22:12", "password or certificate"),
        ("exchange: events", "exchange: ''", "26:68", "exchange is empty"),
        ('vhosts: ["/"]\n    networks', 'vhosts: ["/", "/"]\n    networks', "6:19", "duplicate"),
        ("description: mover", "description: &a mover\n    vhosts: *a", "5:13", "aliases"),
        ("devices:", "devices: [", "", "not YAML"),
    ],
)
def test_problems_have_a_place(old, new, where, fault):
    assert GOOD.count(old) >= 1
    _, problems = read(GOOD.replace(old, new, 1), "f.yaml")
    texts = [str(problem) for problem in problems]
    assert any(f"f.yaml:{where}" in text and fault in text for text in texts), texts


def test_all_problems_come_at_once():
    text = GOOD.replace("effect: allow", "effect: x").replace("device_id: APM0001", "device_id: '#'")
    assert len(read(text, "f")[1]) == 4


def test_a_hash_is_in_no_problem():
    text = "schema: authbackend/1\naccounts:\n  - {name: a, login: password, password_hash: hunter2}\n"
    problems = read(text, "f")[1]
    assert problems
    assert "hunter2" not in str(problems)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "schema: authbackend/1\ndevices: {a: b}",
        "schema: [",
        "a: b",
        "\x00",
        "x: !!python/object/apply:os.system [ls]",
    ],
)
def test_what_is_no_policy_file_is_told(text):
    assert read(text, "f")[1]


def test_devices_from_csv_and_json_lines(tmp_path):
    csv = tmp_path / "d.csv"
    csv.write_text(
        "device_id,common_name,type,status,attr.site,expires_at\nA1,,APM,,hamburg,2027-01-31\nA2,cn two,APM,revoked,,\n"
    )
    devices, problems = read_devices(csv)
    assert problems == []
    assert devices["A1"].common_name == "A1"
    assert devices["A1"].status is None
    assert devices["A1"].attributes == (("site", "hamburg"),)
    assert devices["A2"].status == "revoked"
    lines = tmp_path / "d.jsonl"
    lines.write_text('{"device_id": "A1", "type": "APM", "attributes": {"site": "hamburg"}}\n')
    assert read_devices(lines)[0]["A1"].attributes == (("site", "hamburg"),)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("A 1,,APM", "letters"),
        ('A1,"a,b",APM', "joins"),
        ("A1,,", "no type"),
        ("A1,,APM,more", "too many or too few cells"),
        ("A0,,APM", "duplicate device id A0"),
        ("A2,A0,APM", "same common name"),
    ],
)
def test_problems_of_devices_have_their_line(tmp_path, line, fault):
    csv = tmp_path / "d.csv"
    csv.write_text(f"device_id,common_name,type\nA0,,APM\n{line}\n")
    _, problems = read_devices(csv)
    assert [problem.line for problem in problems] == [3]
    assert fault in problems[0].message


def test_lint_finds_what_is_hardly_meant():
    text = """\
schema: authbackend/1
device_types:
  OPEN: {client_ids: ["{device_id}"], vhosts: ["/"], rules: [{effect: allow, action: subscribe, topic: "#"}]}
  SHUT: {rules: [{effect: allow, action: publish, topic: a/b}, {effect: deny, action: publish, topic: "a/#"}]}
  SITE: {client_ids: ["{device_id}"], vhosts: ["/"], rules: [{effect: allow, action: publish, topic: "{attr.site}/x"}]}
devices: [{device_id: D, type: SITE}]
accounts: [{name: a, login: certificate, vhosts: ["/"], rules: [{effect: allow, action: publish, topic: "{device_id}"}]}]
"""
    document, problems = read(text, "f")
    assert problems == []
    problems = lint(document)
    assert all(problem.line > 1 and problem.column > 1 for problem in problems)
    warnings = "\n".join(problem.message for problem in problems)
    for part in (
        "topics of every other device",
        "no client_ids",
        "no vhosts",
        "covers it",
        "no attribute site",
        "no value for an account",
    ):
        assert part in warnings


def test_a_clean_file_has_no_warning():
    assert lint(read(GOOD, "f")[0]) == []


def test_every_warning_names_the_line_it_is_about():
    """Also for two rules that differ only in their exchange."""
    text = """\
schema: authbackend/1
accounts:
  - name: a
    login: certificate
    vhosts: ["/"]
    rules:
      - {effect: allow, action: publish, topic: "%c/x"}
      - {effect: allow, action: publish, topic: "%c/x", exchange: events}
"""
    document, problems = read(text, "f")
    assert problems == []
    assert [(problem.line, problem.column) for problem in lint(document, "f")] == [(7, 9), (8, 9)]
