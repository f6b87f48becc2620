"""Devices from a CSV or JSON-lines file, for fleets too large for one YAML document."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from authbackend.document.model import DeviceEntry, Problem
from authbackend.document.read import parse_time
from authbackend.policy import names
from authbackend.policy.rules import Status

_COLUMNS = ("device_id", "common_name", "type", "status", "status_reason", "expires_at")
_MOST_PROBLEMS = 100


def read_devices(path: Path) -> tuple[dict[str, DeviceEntry], list[Problem]]:
    """
    Read devices, one a line.

    CSV has a header of ``device_id``, ``common_name``, ``type``, ``status``, ``status_reason``, ``expires_at`` and
    ``attr.NAME`` for attributes; an empty cell is absent. JSON lines (``.jsonl``, ``.ndjson``) have the keys of the
    policy file, without ``rules``: rules of devices, and attributes that the file does not speak of, are left alone.
    Reading stops after 100 problems.
    """
    devices: dict[str, DeviceEntry] = {}
    problems: list[Problem] = []
    common_names: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = _json_lines(file) if path.suffix in (".jsonl", ".ndjson", ".json") else _csv_lines(file)
        try:
            for number, row in lines:
                faults = _faults(row) or _add(row, devices, common_names)
                problems += [Problem(str(path), number, 1, message) for message in faults]
                if len(problems) >= _MOST_PROBLEMS:
                    break
        except (UnicodeDecodeError, csv.Error) as error:
            problems.append(Problem(str(path), 0, 0, f"cannot be read: {error}"))
    return devices, problems


def _csv_lines(file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(file, strict=True)
    twice = [name for name in reader.fieldnames or () if (reader.fieldnames or []).count(name) > 1]
    if twice:
        yield 1, {f"the column {twice[0]} twice": ""}
        return
    attributes_told = any(name.startswith("attr.") for name in reader.fieldnames or ())
    for row in reader:
        found: dict[str, object] = {}
        attributes = {}
        for name, value in row.items():
            if name is None or value is None:
                found["a cell too many or too few"] = ""
            elif name.startswith("attr."):
                if value != "":
                    attributes[name[5:]] = value
            elif value != "":
                found[name] = value
        if attributes_told:
            found["attributes"] = attributes
        yield reader.line_num, found


def _json_lines(file: Iterable[str]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = {f"JSON: {error.msg}": ""}
        except RecursionError:
            row = {"JSON: nested too deeply": ""}
        yield number, row if isinstance(row, dict) else {"not a JSON object": ""}


def _faults(row: Mapping[str, object]) -> list[str]:
    faults = [f"unknown: {name}" for name in row if name not in (*_COLUMNS, "attributes")]
    faults += [f"{name} must be text" for name in _COLUMNS if not _is_text(row.get(name, ""))]
    attributes = row.get("attributes", {})
    if not isinstance(attributes, dict):
        return [*faults, "attributes must be an object"]
    for name, value in attributes.items():
        if fault := names.attribute_fault(name):
            faults.append(f"attribute {name!r}: {fault}")
        if not _is_text(value):
            faults.append(f"attribute {name!r} must be text")
    if faults:
        return faults
    device_id = str(row.get("device_id", ""))
    if fault := names.device_id_fault(device_id):
        faults.append(f"device id {device_id!r}: {fault}")
    if fault := names.common_name_fault(str(row.get("common_name", device_id))):
        faults.append(f"common name {row.get('common_name', device_id)!r}: {fault}")
    if "type" not in row:
        faults.append(f"device {device_id} has no type")
    if row.get("status", "active") not in tuple(Status):
        faults.append(f"status {row['status']!r}: possible are {', '.join(Status)}")
    return faults


def _is_text(value: object) -> bool:
    """Return whether a value is text that PostgreSQL can hold: no NUL and no half of a surrogate pair."""
    return isinstance(value, str) and "\x00" not in value and not any("\ud800" <= one <= "\udfff" for one in value)


def _add(row: Mapping[str, object], devices: dict[str, DeviceEntry], common_names: dict[str, str]) -> list[str]:
    device_id = str(row["device_id"])
    common_name = str(row.get("common_name", device_id))
    if device_id in devices:
        return [f"device id {device_id} is there twice"]
    if common_name in common_names:
        return [f"devices {common_names[common_name]} and {device_id} have the same common name {common_name}"]
    expires_at = None
    if "expires_at" in row:
        try:
            expires_at = parse_time(str(row["expires_at"]))
        except ValueError:
            return [f"{row['expires_at']!r} is no time; write it as 2027-01-31T12:00:00Z"]
    attributes = row.get("attributes")
    common_names[common_name] = device_id
    devices[device_id] = DeviceEntry(
        device_id,
        common_name,
        str(row["type"]),
        status=str(row["status"]) if "status" in row else None,
        status_reason=str(row["status_reason"]) if "status_reason" in row else None,
        attributes=tuple(sorted(attributes.items())) if isinstance(attributes, dict) else None,
        expires_at=expires_at,
    )
    return []
