"""The limits of the house that no linter holds."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "authbackend"
LONGEST_FUNCTION = 50
LONGEST_MODULE = 600


def test_no_function_and_no_module_is_too_long():
    too_long = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > LONGEST_MODULE:
            too_long.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    too_long.append(f"{path.name}: {node.name} has {lines} lines")
    assert too_long == []
