"""Devices from a CSV or JSON-lines file, for fleets too large for one YAML document."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from authbackend.policy import names
from authbackend.policy.model import Status
from authbackend.policy_file.model import DeviceEntry, Problem
from authbackend.policy_file.read import decode, parse_time

_COLUMNS = ("device_id", "common_name", "type", "status", "status_reason", "expires_at")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_NO_DEVICES = "[]"
_MOST_PROBLEMS = 100


def read_devices(path: Path) -> tuple[dict[str, DeviceEntry], list[Problem]]:
    """
    Read devices, one per line.

    CSV has a header with ``device_id``, ``common_name``, ``type``, ``status``, ``status_reason``, ``expires_at`` and
    ``attr.NAME`` for attributes; an empty cell counts as absent. JSON lines (``.jsonl``, ``.ndjson``, ``.json``) have
    the keys of the policy file, without ``rules``: the rules of devices, and attributes if the file has none, are left
    alone. A file without a header, or JSON lines without a line, is a problem rather than an empty list, because with
    ``--prune`` an empty list removes all devices. For no devices, write the header alone, or ``[]`` as JSON. Reading
    stops after 100 problems.
    """
    return parse_devices(path.read_bytes(), str(path), json_lines=path.suffix in _JSON_SUFFIXES)


def parse_devices(content: bytes, file: str, *, json_lines: bool) -> tuple[dict[str, DeviceEntry], list[Problem]]:
    """Read devices from the contents of a file; see :func:`read_devices`."""
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
        has_attributes = any(name.startswith("attr.") for name in header)
        for row in reader:
            yield reader.line_num, _csv_row(row, has_attributes)
    except csv.Error as error:
        yield max(1, reader.line_num), f"not CSV: {error}"  # line_num is 0 if the first line fails


def _header_fault(header: list[str]) -> str | None:
    """Return why the first line is not a header; an HTML error page must not pass as an empty list."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and separator in header[0]:
            return f"the columns are separated by {name}; save the file with commas between them"
    if "device_id" not in header or "type" not in header:
        first = repr(",".join(header)[:60]) if header else "nothing"
        return f"not a list of devices: the first line must name the columns, device_id and type among them, but is {first}"
    if repeated := [name for name, times in Counter(header).items() if times > 1]:
        return f"duplicate column {repeated[0]}"
    if unknown := [name for name in header if name not in _COLUMNS and not name.startswith("attr.")]:
        return f"unknown columns: {', '.join(unknown)}; must be among: {', '.join(_COLUMNS)}, attr.NAME"
    return None


def _csv_row(row: Mapping[str | None, str | None], has_attributes: bool) -> Mapping[str, object] | str:
    if None in row or None in row.values():
        return "too many or too few cells for the header"
    values: dict[str, object] = {}
    attributes: dict[str, object] = {}
    for name, value in row.items():
        if name is not None and value:
            if name.startswith("attr."):
                attributes[name[5:]] = value
            else:
                values[name] = value
    if has_attributes:
        values["attributes"] = attributes
    return values


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
            yield number, "cannot read this JSON: it is nested too deeply, or a number is too long"
        else:
            yield number, row if isinstance(row, dict) else "not a JSON object; write one device on each line"
    if rows == 0:
        yield 1, f"not a list of devices: the file is empty; for no devices, write {_NO_DEVICES}"


def _faults(row: Mapping[str, object]) -> list[str]:
    faults = [f"unknown key {name}" for name in row if name not in (*_COLUMNS, "attributes")]
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
        faults.append(f"status {row['status']!r}: must be one of: {', '.join(Status)}")
    return faults


def _is_text(value: object) -> bool:
    """Return whether a value is text that PostgreSQL can store: without NUL and without lone surrogates."""
    return isinstance(value, str) and "\x00" not in value and not any("\ud800" <= one <= "\udfff" for one in value)


def _add(row: Mapping[str, object], devices: dict[str, DeviceEntry], common_names: dict[str, str]) -> list[str]:
    device_id = str(row["device_id"])
    common_name = str(row.get("common_name", device_id))
    if device_id in devices:
        return [f"duplicate device id {device_id}"]
    if common_name in common_names:
        return [f"devices {common_names[common_name]} and {device_id} have the same common name {common_name}"]
    expires_at = None
    if "expires_at" in row:
        try:
            expires_at = parse_time(str(row["expires_at"]))
        except ValueError:
            return [f"{row['expires_at']!r} is not a time; write it as 2027-01-31T12:00:00Z"]
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
