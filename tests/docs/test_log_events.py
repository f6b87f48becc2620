"""Every event that the code logs is in the list that docs/log-events.md is made from, with its level, and no other is."""

import ast
from pathlib import Path

from authbackend.logs.events import EVENTS

PACKAGE = Path(__file__).parent.parent.parent / "authbackend"
LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}


def logged():
    """Yield (event, level, place) of every call of a module's ``log``, and of every fault that is logged while it lasts."""
    for file in PACKAGE.rglob("*.py"):
        if file.name == "fault_log.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="FaultLog"), args=[event, *over]):
                    yield event.value, "warning", f"{file.name}:{node.lineno}"
                    for each in over:
                        yield each.value, "info", f"{file.name}:{node.lineno}"
                case ast.Call(func=ast.Attribute(attr="_log_fault"), args=[event, *level]):
                    yield event.value, level[0].value if level else "warning", f"{file.name}:{node.lineno}"
                case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method), args=[event, *_]):
                    if method in LEVELS:
                        assert isinstance(event, ast.Constant), f"{file}:{node.lineno}: an event is a plain string"
                        yield event.value, LEVELS[method], f"{file.name}:{node.lineno}"


def test_every_event_is_in_the_list_and_no_other():
    levels = {}
    for event, level, place in logged():
        assert event in EVENTS, f"{place}: add {event} to authbackend/logs/events.py"
        levels.setdefault(event, set()).add(level)
    assert {event: set(level.split(", ")) for event, (level, _) in EVENTS.items()} == levels
