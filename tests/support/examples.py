"""The console examples of the documentation, and whether a program printed what they show."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?: *<!-- (?P<mark>(?:not )?executed: [^\n]+?) -->\n+)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
PROMPT = re.compile(r"^(?P<prompt>[a-z]*\$ +|[a-z]+=> )(?P<command>(?:.*\\\n)*.*)\n?", re.MULTILINE)

# What differs from run to run: as a page shows it, and as it may be.
VARYING = (
    (r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d[:.\d]*(?:\+00:00)?", r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d[:.\d]*(?:\+00:00)?"),
    (r"\b\d{4}-\d\d-\d\d\b", r"\d{4}-\d\d-\d\d"),
    (r"\b\d+@[0-9a-f]{8}\b", r"\d+@[0-9a-f]{8}"),  # a registry version
    (r"\b[0-9a-f]{38,40}\b", r"[0-9a-f]{30,40}"),  # a serial number
    (r"\b1\d{12}\b", r"\d{13}"),  # the number of a revocation list: milliseconds
    (r"(?<=\btask )\d+", r"\d+"),
    (r"(?<=\brule )\d+(?= of )", r"\d+"),
    (r"(?<=closed: )[2-9](?= on )", r"[1-9]\d*"),
    (r"\b[\d.]+(?= s after)", r"[\d.]+"),
    (r'(?<="last_id": )\d+', r"\d+"),
    (r'(?<="next_version": ")\d+', r"\d+"),
    (r" {2,}", r" {2,}"),  # columns are as wide as their values
    (r"…", r".*"),
)
_VARYING = re.compile("|".join(f"(?P<v{n}>{shown})" for n, (shown, _) in enumerate(VARYING)))


@dataclass(frozen=True, slots=True)
class Example:
    """
    A command and what it prints.

    Attributes:
        prompt: That of a shell, ``$``, or of psql, ``authbackend=>``.
        expected: Empty if the page shows no output.
    """

    prompt: str
    command: str
    expected: str


@dataclass(frozen=True, slots=True)
class Block:
    """
    A fenced block of a page.

    Attributes:
        page: Its path in the repository.
        mark: The comment before it: ``executed: FILE`` or ``not executed: REASON``; empty without one.
    """

    page: str
    language: str
    mark: str
    text: str

    @property
    def examples(self) -> list[Example]:
        """The commands of a console block with their output."""
        found = list(PROMPT.finditer(self.text))
        ends = [one.start() for one in found[1:]] + [len(self.text)]
        return [
            Example(one["prompt"].strip(), one["command"], self.text[one.end() : end].rstrip("\n"))
            for one, end in zip(found, ends, strict=True)
        ]


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    page = str(path.relative_to(REPO))
    for found in FENCE.finditer(path.read_text(encoding="utf-8")):
        yield Block(page, found["language"], found["mark"] or "", textwrap.dedent(found["text"]))


def matches(expected: str, printed: str) -> bool:
    """Whether an output is what the page shows, up to :data:`VARYING`; a line ``…`` stands for any lines."""
    return re.fullmatch("".join(map(_line, expected.split("\n"))), printed.rstrip("\n") + "\n") is not None


def _line(line: str) -> str:
    if line.strip() == "…":
        return r"(?:.*\n)*"
    pattern, end = "", 0
    for found in _VARYING.finditer(line):
        assert found.lastgroup is not None
        pattern += re.escape(line[end : found.start()]) + VARYING[int(found.lastgroup[1:])][1]
        end = found.end()
    return pattern + re.escape(line[end:]) + r"\n"


def assert_shown(page: str, printed: Mapping[str, str], here: Mapping[str, str]) -> None:
    """
    Compare a block of a page with what a test saw.

    Args:
        page: The page.
        printed: The commands of the block, as the page has them, with what each printed.
        here: Names on the page and those of the test.
    """
    first = next(iter(printed))
    (block,) = [one for one in blocks(REPO / page) if one.language == "console" and one.examples[0].command == first]
    assert [one.command for one in block.examples] == list(printed)
    for example in block.examples:
        expected = example.expected
        for shown, real in here.items():
            expected = expected.replace(shown, real)
        real = printed[example.command]
        assert matches(expected, real), f"{page} shows\n$ {example.command}\n{expected}\nand printed was\n{real}"
