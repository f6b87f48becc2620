"""CONTRIBUTING.md names files that are there, and every package is on its map."""

import re
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
TEXT = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_file_that_a_recipe_names_is_there():
    named = re.findall(r"`([a-z_]+/[a-z_./-]*)`", TEXT)
    assert len(named) > 30
    missing = [name for name in named if not (REPO / name).exists() and not (REPO / "authbackend" / name).exists()]
    assert missing == []


def test_every_package_is_on_the_map():
    shown = TEXT.partition("## The map")[2].partition("Beside them")[0]
    packages = [each.name for each in (REPO / "authbackend").iterdir() if (each / "__init__.py").exists()]
    assert [name for name in packages if not re.search(rf"^{name} |\b{name}   ", shown, re.MULTILINE)] == []
