"""The documentation says what the code does: generated pages are fresh, and the README's files exist."""

import re
from pathlib import Path

import pytest
import yaml

from authbackend.cli.reference import REASONS, pages
from authbackend.policy.reasons import Reason
from authbackend.settings import setting_names, variable

REPO = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", list(pages()))
def test_generated_pages_are_fresh(name):
    assert (REPO / "docs" / name).read_text(encoding="utf-8") == pages()[name], "run: make docs"


def test_every_setting_is_in_the_reference():
    text = pages()["configuration.md"]
    for path in setting_names():
        assert f"`{variable(path)}`" in text


def test_the_page_says_of_every_file_when_it_is_read_again():
    table = pages()["configuration.md"].partition("## When a file changes")[2].partition("## `[")[0]
    named = {name.strip("`") for name in re.findall(r"`[a-z_.]+`", table)}
    for path in setting_names():
        if path[-1].endswith("_file") or path == ("pki", "authority_dir"):
            assert ".".join(path) in named
            (row,) = re.findall(rf"^\| `{variable(path)}` .*$", pages()["configuration.md"], re.MULTILINE)
            assert "ead again" in row


def test_every_reason_is_explained():
    assert set(REASONS) == set(Reason)


def test_links_of_the_documentation_lead_somewhere():
    broken = []
    for page in [
        REPO / "README.md",
        REPO / "CHANGELOG.md",
        REPO / "rabbitmq" / "README.md",
        *(REPO / "docs").rglob("*.md"),
    ]:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(REPO)}: {link}")
    assert broken == []


def test_every_test_that_a_page_names_is_there():
    there = {path.stem for path in (REPO / "tests").rglob("test_*.py")}
    named = {
        (str(page.relative_to(REPO)), name)
        for page in [REPO / "README.md", *(REPO / "docs").rglob("*.md")]
        for name in re.findall(r"\btest_[a-z0-9_]+\b", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert {(page, name) for page, name in named if name not in there} == set()


def test_the_builder_gets_every_file_that_the_image_is_made_of():
    ignored = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (REPO / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources
    assert {f"!{source.removeprefix('./')}" for source in sources} <= set(ignored)


def test_every_table_has_a_bound_or_a_retention():
    schema = (REPO / "sql/schema.sql").read_text(encoding="utf-8")
    tables = set(re.findall(r"^CREATE (?:UNLOGGED )?TABLE public\.(\w+)", schema, re.MULTILINE))
    page = (REPO / "docs/operations.md").read_text(encoding="utf-8")
    section = page.partition("### What grows, and what bounds it")[2].partition("\n### ")[0]
    named = {
        name
        for row in section.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert len(tables) > 20
    assert tables - named == set()


def test_no_container_keeps_its_log_without_end():
    services = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert {
        name for name, service in services.items() if "max-size" not in service.get("logging", {}).get("options", {})
    } == set()
