"""Makes a certificate for each device of a load test, in several processes, and the files that register the devices."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from authbackend.pki.bench_ca import Authority, PKIError
from authbackend.pki.bench_certificates import device_name_fault, make_certificates
from authbackend_load.plan import CERTIFICATES, DEVICES_FILE, PUBLISH, SUBSCRIBE, LoadError

POLICY_FILE = "policy.yaml"
_PORTION = 250
_POLICY = """\
# The device type of a load test: what the devices of authbackend-load do by default. Register them with
#   authbackend policy apply {directory}/{policy} --devices {directory}/{devices}
schema: authbackend/1

device_types:
  {type}:
    description: Devices of a load test
    client_ids: ["{{device_id}}"]
    vhosts: ["/"]
    rules:
      - {{effect: allow, action: subscribe, topic: "{subscribe}"}}
      - {{effect: allow, action: publish, topic: "{publish}/#"}}
"""


@dataclass(frozen=True, slots=True)
class Made:
    """
    How many certificates were made.

    Attributes:
        written: Made now.
        kept: Already there.
    """

    written: int
    kept: int


def device_ids(prefix: str, count: int) -> list[str]:
    """
    Return the ids PREFIX000001, PREFIX000002, and so on.

    Raises:
        LoadError: The prefix cannot be part of a device id.
    """
    ids = [f"{prefix}{number:06d}" for number in range(1, count + 1)]
    if fault := device_name_fault(ids[-1]):
        raise LoadError(fault)
    return ids


def make(
    directory: Path,
    ids: list[str],
    *,
    device_type: str,
    revoked: int = 0,
    processes: int = 1,
    progress: Callable[[int], None] = lambda _done: None,
) -> Made:
    """
    Make what is missing: the certificates of authorities and servers as ``authbackend certs`` does, one for each
    device, and ``policy.yaml``. ``devices.csv`` is always written.

    Args:
        revoked: How many devices at the end of the list to register as revoked.
        progress: Called with the number of certificates made so far.
    Raises:
        LoadError: A file in the directory cannot be used or written.
    """
    try:
        for _ in make_certificates(directory):
            pass
        folder = directory / CERTIFICATES
        folder.mkdir(exist_ok=True)
        existing = {path.stem for path in folder.glob("*.pem")}
        missing = [device_id for device_id in ids if device_id not in existing]
        for done in _issue(directory, folder, missing, processes):
            progress(done)
        _write_devices(directory / DEVICES_FILE, ids, device_type, revoked)
        _write_policy(directory, device_type)
    except PKIError as error:
        raise LoadError(str(error)) from error
    except OSError as error:
        raise LoadError(f"{error.filename or directory}: {error.strerror}") from error
    return Made(len(missing), len(ids) - len(missing))


def _issue(directory: Path, folder: Path, ids: list[str], processes: int) -> Iterator[int]:
    ca = ((directory / "ca.pem").read_bytes(), (directory / "ca.key").read_bytes())
    portions = [ids[begin : begin + _PORTION] for begin in range(0, len(ids), _PORTION)]
    done = 0
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for count in pool.map(_issue_portion, [ca] * len(portions), [folder] * len(portions), portions):
            done += count
            yield done


def _issue_portion(ca: tuple[bytes, bytes], folder: Path, ids: list[str]) -> int:
    authority = Authority.load(*ca)
    for device_id in ids:
        issued = authority.issue_client(device_id)
        beside = folder / f".{device_id}.{os.getpid()}"
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(issued.certificate_pem + issued.key_pem)
        beside.rename(folder / f"{device_id}.pem")  # a partly written file never has a certificate's name
    return len(ids)


def _write_devices(file: Path, ids: list[str], device_type: str, revoked: int) -> None:
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(("device_id", "common_name", "type", "status"))
        for index, device_id in enumerate(ids):
            status = "revoked" if index >= len(ids) - revoked else "active"
            writer.writerow((device_id, device_id, device_type, status))


def _write_policy(directory: Path, device_type: str) -> None:
    file = directory / POLICY_FILE
    if file.exists():  # the user may have edited it
        return
    text = _POLICY.format(
        type=device_type,
        directory=directory,
        policy=POLICY_FILE,
        devices=DEVICES_FILE,
        subscribe=SUBSCRIBE,
        publish=PUBLISH,
    )
    file.write_text(text, encoding="utf-8")
