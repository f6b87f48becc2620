"""What people gave to the commands by mistake, or as other products write it: ``tests/cases/field``."""

from pathlib import Path

import pytest

from tests.cli.test_certificates import as_json

FIELD = Path(__file__).parent.parent / "cases" / "field"

# --- lists of devices ----------------------------------------------------------------------------------------------

LISTS_OF_NO_DEVICES = {
    "error-page.csv": "<html><body>502 Bad Gateway</body></html>",
    "error-page-of-many-lines.csv": "<html>\n<body>\n502 Bad Gateway\n</body>\n</html>\n",
    "nothing.csv": "",
    "text.csv": "not csv at all",
    "no-type.csv": "device_id,common_name\n",
    "nothing.jsonl": "",
    "blank.jsonl": "\n \n",
    "error-page.json": "<html><body>502 Bad Gateway</body></html>",
    "half.csv": 'device_id,type\nCSV001,"CSV',
}


@pytest.mark.parametrize("name", LISTS_OF_NO_DEVICES)
def test_what_is_no_list_of_devices_removes_none(cli, fleet, execute, tmp_path, name):
    (tmp_path / name).write_text(LISTS_OF_NO_DEVICES[name])
    refused = cli("policy", "apply", FIELD / "csv/base.yaml", "--devices", name, "--prune", exit_code=2)
    assert f"{name}:" in refused.stderr
    assert len(execute("select 1 from device")) == 2


@pytest.mark.parametrize(("name", "text"), [("d.csv", "device_id,type\n"), ("d.jsonl", "[]\n")])
def test_a_list_that_says_there_are_no_devices_is_believed(cli, fleet, execute, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    cli("policy", "apply", FIELD / "csv/base.yaml", "--devices", name, "--prune")
    assert execute("select 1 from device") == []


@pytest.mark.parametrize(("separator", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_separator_is_named_once(cli, tmp_path, separator, word):
    text = (FIELD / "csv/semi.csv").read_text().replace(";", separator)
    (tmp_path / "semi.csv").write_text(text)
    problems = as_json(cli("policy", "check", FIELD / "csv/base.yaml", "--devices", "semi.csv", "--json", exit_code=2))
    (problem,) = problems["problems"]
    assert f"separated by {word}" in problem["message"]


def test_a_list_that_is_not_utf_8_is_told_with_its_place(cli, tmp_path):
    (tmp_path / "latin.csv").write_bytes("device_id,type,status_reason\nA,T,gestört\n".encode("latin-1"))
    refused = cli("policy", "check", FIELD / "csv/base.yaml", "--devices", "latin.csv", exit_code=2)
    assert "latin.csv:2:9: " in refused.stdout
