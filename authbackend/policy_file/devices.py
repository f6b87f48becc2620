"""Devices from a CSV or JSON-lines file, for fleets too large for one YAML document."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from authbackend.policy import names
from authbackend.policy.rules import Status
from authbackend.policy_file.model import DeviceEntry, Problem
from authbackend.policy_file.read import decode, parse_time

_COLUMNS = ("device_id", "common_name", "type", "status", "status_reason", "expires_at")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_NO_DEVICES = "[]"
_MOST_PROBLEMS = 100


def read_devices(path: Path) -> tuple[dict[str, DeviceEntry], list[Problem]]:
    """
    Read devices, one a line.

    CSV has a header of ``device_id``, ``common_name``, ``type``, ``status``, ``status_reason``, ``expires_at`` and
    ``attr.NAME`` for attributes; an empty cell is absent. A file without the header, or JSON lines without a line, is a
    problem and not a list without devices: with ``--prune`` it would remove them all. No devices: the header alone, or
    ``[]`` as JSON. JSON lines (``.jsonl``, ``.ndjson``) have the keys of the
    policy file, without ``rules``: rules of devices, and attributes that the file does not speak of, are left alone.
    Reading stops after 100 problems.
    """
    return parse_devices(path.read_bytes(), str(path), json_lines=path.suffix in _JSON_SUFFIXES)


def parse_devices(content: bytes, file: str, *, json_lines: bool) -> tuple[dict[str, DeviceEntry], list[Problem]]:
    """Read devices from what is in a file; see :func:`read_devices`."""
    text, fault = decode(content, file)
    if fault is not None:
        return {}, [fault]
    devices: dict[str, DeviceEntry] = {}
    problems: list[Problem] = []
    common_names: dict[str, str] = {}
    for number, row in (_json_lines if json_lines else _csv_lines)(text):
        faults = [row] if isinstance(row, str) else _faults(row) or _add(row, devices, common_names)
        problems += [Problem(file, number, 1, message) for message in faults]
        if len(problems) >= _MOST_PROBLEMS:
            break
    return devices, problems


def _csv_lines(text: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        if fault := _header_fault(header):
            yield 1, fault
            return
        attributes_told = any(name.startswith("attr.") for name in header)
        for row in reader:
            yield reader.line_num, _csv_row(row, attributes_told)
    except csv.Error as error:
        yield max(1, reader.line_num), f"not CSV: {error}"  # of the first line, before it has been counted


def _header_fault(header: list[str]) -> str | None:
    """Return why the first line is no header. Without this, an error page would be a list without devices."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and separator in header[0]:
            return f"the columns are separated by {name}; save the file with commas between them"
    if "device_id" not in header or "type" not in header:
        first = repr(",".join(header)[:60]) if header else "nothing"
        return f"not a list of devices: the first line must name the columns, device_id and type among them, but is {first}"
    if repeated := [name for name, times in Counter(header).items() if times > 1]:
        return f"the column {repeated[0]} twice"
    if unknown := [name for name in header if name not in _COLUMNS and not name.startswith("attr.")]:
        return f"unknown: {', '.join(unknown)}; possible columns are {', '.join(_COLUMNS)} and attr.NAME"
    return None


def _csv_row(row: Mapping[str | None, str | None], attributes_told: bool) -> Mapping[str, object] | str:
    if None in row or None in row.values():
        return "a cell too many or too few"
    found: dict[str, object] = {}
    attributes: dict[str, object] = {}
    for name, value in row.items():
        if name is not None and value:
            if name.startswith("attr."):
                attributes[name[5:]] = value
            else:
                found[name] = value
    if attributes_told:
        found["attributes"] = attributes
    return found


def _json_lines(text: str) -> Iterator[tuple[int, Mapping[str, object] | str]]:
    if text.strip() == _NO_DEVICES:
        return
    rows = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        rows += 1
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg}"
        except (RecursionError, ValueError):  # ValueError: a number of more than 4,300 digits
            yield number, "not JSON that can be read: nested too deeply, or a number too long"
        else:
            yield number, row if isinstance(row, dict) else "not a JSON object; write one device on each line"
    if rows == 0:
        yield 1, f"not a list of devices: the file is empty; if no device is meant, write {_NO_DEVICES}"


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
