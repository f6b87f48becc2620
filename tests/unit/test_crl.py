"""CRLs: that OpenSSL and RabbitMQ can read them, and which ones are refused."""

import asyncio
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import CRLEntryExtensionOID, NameOID

from authbackend.api.server import show_errors
from authbackend.certificates.crl_endpoint import PublishedCrl, PublishedCrls
from authbackend.errors import Unavailable
from authbackend.pki import signing
from authbackend.pki.crl import (
    REASONS,
    CrlEntry,
    age_fault,
    check_entries,
    entries_of,
    issuer_hash,
    list_pem,
    next_number,
    read_list,
    sign_list,
)
from authbackend.pki.crl_sync import Sync
from authbackend.pki.openssl_index import index_of
from authbackend.pki.parsing import PKIError

NOW = datetime.now(UTC)
WEEK = timedelta(days=7)
FIELD = Path(__file__).parent.parent / "cases" / "field"
openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def authority(name=None, key=None):
    """A root and its key."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = name or signing.subject_of(["test CA"])
    valid = signing.validity(None, None, timedelta(days=30))
    return signing.sign_authority(name, key.public_key(), issuer=name, key=key, valid=valid, path_length=0), key


CA, KEY = authority()


def signed(entries=(), number=7, now=NOW, lifetime=WEEK, issuer=CA, key=KEY):
    return sign_list(list(entries), issuer=issuer, key=key, number=number, now=now, lifetime=lifetime)


def ask_openssl(*arguments, stdin):
    return subprocess.run(["openssl", *arguments], input=stdin, capture_output=True, check=True).stdout.decode()


# --- signing -------------------------------------------------------------------------------------------------------


def test_a_list_holds_what_was_revoked_when_and_why():
    entries = [
        CrlEntry("a1", "keyCompromise", NOW - timedelta(days=1)),
        CrlEntry("7f" + "ff" * 19, "unspecified", NOW),
        CrlEntry("2", "left in a taxi", NOW),
    ]
    made = signed(entries, number=12)
    crl, signer = read_list(made.der, [CA])
    assert signer is CA
    assert (crl.number, crl.next_update - crl.this_update) == (12, WEEK)
    assert [(e.serial, e.reason) for e in entries_of(crl.der)] == [
        ("a1", "keyCompromise"),
        ("7f" + "ff" * 19, ""),
        ("2", ""),
    ]
    assert next(iter(entries_of(crl.der))).revoked_at == (NOW - timedelta(days=1)).replace(microsecond=0)


ODD_SERIALS = [0, -1, -128, -129, -(2**63), 2**159, 2**1000]


def test_a_list_holds_serial_numbers_that_the_library_refuses():
    made = signed([CrlEntry(f"{number:x}", "superseded", NOW) for number in ODD_SERIALS])
    crl, _ = read_list(list_pem(made.der), [CA])
    check_entries(crl.der)
    assert crl == made
    assert [(entry.serial, entry.reason) for entry in entries_of(crl.der)] == [
        (f"{number:x}", "superseded") for number in ODD_SERIALS
    ]


@openssl
def test_openssl_reads_serial_numbers_that_the_library_refuses(tmp_path):
    shown = ODD_SERIALS[:-1]  # openssl breaks longer ones into lines
    ca = tmp_path / "ca.pem"
    ca.write_bytes(signing.certificate_pem(CA))
    made = signed([CrlEntry(f"{number:x}", "", NOW) for number in shown])
    printed = subprocess.run(
        ["openssl", "crl", "-CAfile", str(ca), "-text", "-noout"],
        input=list_pem(made.der),
        capture_output=True,
        check=True,
    )
    assert b"verify OK" in printed.stderr
    numbers = re.findall(r"Serial Number: (\S+)", printed.stdout.decode())
    assert [int(number, 16) for number in numbers] == shown


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("year", [1950, 1999, 2049, 2050, 9999])
def test_the_library_reads_what_is_on_a_list_as_it_was_written(reason, year):
    moment = NOW.replace(year=year, month=2, day=3, microsecond=0)
    signed_at = max(moment, NOW.replace(microsecond=0))
    der = signed([CrlEntry("7f" + "ff" * 19, reason, moment)], now=signed_at, lifetime=timedelta(days=1)).der
    (library_entry,) = x509.load_der_x509_crl(der)
    (entry,) = entries_of(der)
    assert library_entry.serial_number == int(entry.serial, 16) == 2**159 - 1
    assert library_entry.revocation_date_utc == entry.revoked_at == moment
    named = [one.value.reason.value for one in library_entry.extensions]
    assert named == ([] if reason == "unspecified" else [reason])
    assert entry.reason == ("" if reason == "unspecified" else reason)


def pss_signed():
    builder = x509.CertificateRevocationListBuilder(RSA_CA.subject, NOW, NOW + WEEK)
    how = padding.PSS(padding.MGF1(hashes.SHA384()), padding.PSS.DIGEST_LENGTH)
    made = builder.sign(RSA_KEY, hashes.SHA384(), rsa_padding=how)
    return made.public_bytes(serialization.Encoding.DER)


RSA_CA, RSA_KEY = authority(key=rsa.generate_private_key(65537, 2048))


@pytest.mark.parametrize(
    "der",
    [signed([CrlEntry("a1", "", NOW)], issuer=RSA_CA, key=RSA_KEY).der, pss_signed()],
    ids=["PKCS #1 v1.5", "PSS"],
)
def test_lists_are_signed_with_rsa_as_well(der):
    assert x509.load_der_x509_crl(der).is_signature_valid(RSA_KEY.public_key())
    assert read_list(der, [CA, RSA_CA])[1] is RSA_CA
    at = len(der) - 30
    with pytest.raises(PKIError, match="none of the given authorities"):
        read_list(der[:at] + bytes([der[at] ^ 1]) + der[at + 1 :], [CA, RSA_CA])


def test_two_algorithms_are_none():
    der = signed().der
    ecdsa = bytes.fromhex("06082a8648ce3d040302")
    assert der.count(ecdsa) == 2
    with pytest.raises(PKIError, match="inner and outer signature algorithms differ"):
        read_list(der[::-1].replace(ecdsa[::-1], bytes.fromhex("06082a8648ce3d040303")[::-1], 1)[::-1], [CA])


def test_a_number_that_cannot_be_kept_is_refused():
    assert read_list(extended(x509.CRLNumber(2**159 - 1), critical=False), [CA])[0].number == 2**159 - 1
    with pytest.raises(PKIError, match="more than 20 octets"):
        read_list(extended(x509.CRLNumber(2**159), critical=False), [CA])


@openssl
def test_openssl_verifies_a_list_and_sees_its_number(tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_bytes(signing.certificate_pem(CA))
    made = signed([CrlEntry("a1", "superseded", NOW)], number=4660)
    text = ask_openssl("crl", "-CAfile", str(ca), "-text", "-noout", stdin=list_pem(made.der))
    assert re.search(r"CRL Number:\s+(4660|0x1234)\b", text)
    assert "Serial Number: A1" in text
    assert "Superseded" in text


def test_a_revocation_in_the_future_is_listed_as_of_now():
    (entry,) = entries_of(signed([CrlEntry("a1", "", NOW + timedelta(hours=1))]).der)
    assert entry.revoked_at == NOW.replace(microsecond=0)


def test_numbers_rise_whatever_the_database_remembers():
    assert next_number(None, NOW) == int(NOW.timestamp() * 1000)
    assert next_number(5, NOW) == int(NOW.timestamp() * 1000), "a restored backup had an older one"
    ahead = next_number(None, NOW) + 1000
    assert next_number(ahead, NOW) == ahead + 1, "the clock went back"


# --- what is refused ---------------------------------------------------------------------------------------------


def foreign(name="test CA"):
    other, key = authority(signing.subject_of([name]))
    return signed(issuer=other, key=key).der


def tampered():
    der = bytearray(signed([CrlEntry("abcdef", "", NOW)]).der)
    at = bytes(der).index(bytes.fromhex("abcdef"))
    der[at] ^= 1
    return bytes(der)


def extended(extension, *, critical=True, next_update=NOW + WEEK):
    builder = x509.CertificateRevocationListBuilder(CA.subject).last_update(NOW).next_update(next_update)
    return (
        builder.add_extension(extension, critical=critical)
        .sign(KEY, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )


def by_words(value):
    """Name a case by its text only: its bytes differ in each process that runs the tests."""
    return value if isinstance(value, str) else "list"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "neither DER nor PEM"),
        (b"<html>502 Bad Gateway</html>", "neither DER nor PEM"),
        (signed().der[:-20], "neither DER nor PEM"),
        (list_pem(signed().der)[:200], "neither DER nor PEM"),
        (foreign(), "none of the given authorities"),
        (foreign("somebody else"), "none of the given authorities.*somebody else"),
        (tampered(), "none of the given authorities"),
        (extended(x509.DeltaCRLIndicator(3)), "delta"),
        (
            extended(
                x509.IssuingDistributionPoint(
                    full_name=None,
                    relative_name=None,
                    only_contains_user_certs=False,
                    only_contains_ca_certs=True,
                    only_some_reasons=None,
                    indirect_crl=False,
                    only_contains_attribute_certs=False,
                )
            ),
            "does not cover device certificates",
        ),
    ],
    ids=by_words,
)
def test_what_is_no_complete_list_of_the_authority_is_refused(content, fault):
    with pytest.raises(PKIError, match=fault):
        read_list(content, [CA])


def extended_entry(reason):
    """Return a list with an entry whose reason does not exist in RFC 5280."""
    oid = CRLEntryExtensionOID.CRL_REASON
    entry = (
        x509.RevokedCertificateBuilder()
        .serial_number(7)
        .revocation_date(NOW)
        .add_extension(x509.UnrecognizedExtension(oid, bytes([0x0A, 1, reason])), critical=False)
        .build()
    )
    builder = x509.CertificateRevocationListBuilder(CA.subject, revoked_certificates=[entry])
    signed_list = builder.last_update(NOW).next_update(NOW + WEEK).sign(KEY, hashes.SHA256())
    return signed_list.public_bytes(serialization.Encoding.DER)


def point(name=None, *, user=False, ca=False, reasons=None, indirect=False):
    names = [x509.UniformResourceIdentifier(name)] if name else None
    return x509.IssuingDistributionPoint(names, None, user, ca, reasons, indirect, False)


POINT = "https://ca.example.test:8443/1.0/crl"


@pytest.mark.parametrize("critical", [True, False])
@pytest.mark.parametrize(
    ("scope", "fault"),
    [
        (point(ca=True), "does not cover device certificates"),
        (point(indirect=True), "indirect"),
        (point(reasons=frozenset([x509.ReasonFlags.key_compromise])), "some reasons"),
        (point(POINT), f"--distribution-point {POINT}"),
        (point(POINT, user=True), f"--distribution-point {POINT}"),
    ],
)
def test_a_list_is_judged_by_its_scope_critical_or_not(scope, fault, critical):
    with pytest.raises(PKIError, match=fault):
        read_list(extended(scope, critical=critical), [CA])


@pytest.mark.parametrize("critical", [True, False])
def test_a_list_with_a_distribution_point_is_taken_if_every_certificate_names_it(critical):
    der = extended(point(POINT), critical=critical)
    assert read_list(der, [CA], POINT)[0].der == der
    with pytest.raises(PKIError, match="brokers would refuse every certificate"):
        read_list(der, [CA], "https://elsewhere.example.test/crl")


def field(name):
    return (FIELD / "crl" / name).read_bytes()


FIELD_CA = x509.load_pem_x509_certificate(field("ca.pem"))


@pytest.mark.parametrize("name", ["text-first.pem", "bom.pem"])
def test_a_list_in_pem_may_have_something_before_it(name):
    assert read_list(field(name), [FIELD_CA])[0].issuer == "CN=Example Intermediate CA,O=Example"


@pytest.mark.parametrize("name", ["stepca.crl", "boulder.crl", "idp-noncritical.crl", "idp-noncritical-hashdir.pem"])
def test_no_list_is_taken_that_locks_out_who_does_not_name_its_distribution_point(name):
    with pytest.raises(PKIError, match="--distribution-point http"):
        read_list(field(name), [FIELD_CA])


def test_the_distribution_point_that_a_refusal_names_is_the_one_that_it_needs():
    for name in ("stepca.crl", "boulder.crl", "idp-noncritical.crl"):
        with pytest.raises(PKIError) as refused:
            read_list(field(name), [FIELD_CA])
        crl, _ = read_list(field(name), [FIELD_CA], refused.value.detail.split()[-1])
        assert crl.der == field(name)


def test_what_only_a_delta_can_say_is_refused():
    with pytest.raises(PKIError, match="serial number 7 cannot be read: reason 8 is not allowed"):
        check_entries(extended_entry(8))


@pytest.mark.parametrize("name", ["reason7.crl", "reason11.crl"])
def test_an_entry_that_brokers_cannot_read_is_named(name):
    crl, _ = read_list(field(name), [FIELD_CA])
    with pytest.raises(PKIError, match="serial number 1002 cannot be read"):
        check_entries(crl.der)


def test_what_is_not_supported_is_not_called_forged():
    with pytest.raises(PKIError, match="unsupported"):
        read_list(field("ed.crl"), [x509.load_pem_x509_certificate(field("ed-ca.pem"))])


def test_a_leaf_signs_no_list():
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = signing.sign_leaf(
        CA.subject,
        key.public_key(),
        issuer=CA.subject,
        key=KEY,
        valid=signing.validity(None, None, WEEK),
        usage=x509.ExtendedKeyUsageOID.CLIENT_AUTH,
        alternative=[],
    )
    with pytest.raises(PKIError, match="none of the given authorities"):
        read_list(signed(issuer=leaf, key=key).der, [leaf])


def test_age_is_told():
    assert age_fault(signed(), NOW) is None
    assert "too old" in age_fault(signed(), NOW + WEEK)
    assert "a clock is wrong" in age_fault(signed(), NOW - timedelta(hours=1))


def test_a_list_without_a_number_counts_by_its_time():
    der = extended(x509.AuthorityKeyIdentifier(b"x", None, None), critical=False)
    assert read_list(der, [CA])[0].number == int(NOW.timestamp())


# --- the file's name -----------------------------------------------------------------------------------------------

NAMES = [
    [[(NameOID.COMMON_NAME, "test CA", _ASN1Type.UTF8String)]],
    [[(NameOID.COMMON_NAME, "  Odd   Spacing \t and CASE  ", _ASN1Type.UTF8String)]],
    [[(NameOID.COMMON_NAME, "Größe ÄÖÜ Ω", _ASN1Type.UTF8String)]],
    [[(NameOID.COMMON_NAME, "Wide ÄÖ", _ASN1Type.BMPString)]],
    [
        [(NameOID.COUNTRY_NAME, "SE", _ASN1Type.PrintableString)],
        [(NameOID.ORGANIZATION_NAME, "Acme, Inc", _ASN1Type.UTF8String)],
        [(NameOID.ORGANIZATIONAL_UNIT_NAME, 'Field "x"', _ASN1Type.UTF8String)],
        [(NameOID.EMAIL_ADDRESS, "CA@Example.ORG", _ASN1Type.IA5String)],
        [(NameOID.COMMON_NAME, "x" * 64, _ASN1Type.UTF8String)],
    ],
    [
        [
            (NameOID.COMMON_NAME, "Two In One", _ASN1Type.UTF8String),
            (NameOID.SERIAL_NUMBER, "77", _ASN1Type.PrintableString),
        ]
    ],
]


@openssl
@pytest.mark.parametrize("rdns", NAMES)
def test_the_name_of_the_file_is_the_one_that_openssl_looks_for(rdns):
    name = x509.Name(
        [
            x509.RelativeDistinguishedName(
                [x509.NameAttribute(oid, value, kind, _validate=False) for oid, value, kind in rdn]
            )
            for rdn in rdns
        ]
    )
    certificate, _ = authority(name)
    pem = signing.certificate_pem(certificate)
    assert issuer_hash(certificate) == ask_openssl("x509", "-noout", "-issuer_hash", stdin=pem).strip()


def test_the_name_of_the_file_without_openssl():
    assert issuer_hash(CA) == "3387b84d"


# --- openssl's database --------------------------------------------------------------------------------------------

INDEX = (
    "V\t271124120000Z\t\t01\tunknown\t/CN=a\n"
    "R\t271124120000Z\t261101120000Z,keyCompromise\t0A0B\tunknown\t/CN=b\n"
    "R\t20501124120000Z\t20500101120000Z\t02\tunknown\t/CN=c\n"
    "R\t271124120000Z\t261101120000Z,holdInstruction,1.2.840.10040.2.2\t03\tunknown\t/CN=d\n"
    "E\t201124120000Z\t\t04\tunknown\t/CN=e\n"
)


def test_revocations_of_an_openssl_authority_are_read():
    revoked = [entry for _, entry in index_of(INDEX, "index.txt") if entry is not None]
    assert [(e.serial, e.reason, e.revoked_at.year) for e in revoked] == [
        ("a0b", "keyCompromise", 2026),
        ("2", "unspecified", 2050),
        ("3", "certificateHold", 2026),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "R\t271124120000Z\tyesterday\t0A\tunknown\t/CN=b",
        "R\t271124120000Z\t19491231235959Z\t0A\tunknown\t/CN=b",
        "R\t1\t2\tXY\tz\tw",
        "V\t1\t\t0x1\tz\tw",
        "V\t1\t\t1_0\tz\tw",
        "V\t1\t\t+1\tz\tw",
        "hello",
        "R\t1\t2\t3",
    ],
)
def test_what_is_no_index_is_refused_with_the_line(line):
    with pytest.raises(PKIError, match=r"index.txt:2: "):
        list(index_of(f"V\t271124120000Z\t\t01\tunknown\t/CN=a\n{line}\n", "index.txt"))


# --- serving and syncing --------------------------------------------------------------------------------------------


class Source:
    """A server of lists: answers from ``lists`` as the service does, or with ``body`` if set."""

    def __init__(self):
        self.lists = PublishedCrls()
        self.body = None
        self.requested = asyncio.Event()
        self.url = ""

    async def answer(self, request):
        self.requested.set()
        if self.body is not None:
            return web.Response(body=self.body)
        return await self.lists.show(request)

    def publish(self, made):
        self.lists.replace({"fleet": PublishedCrl(made.der, made.this_update)})


@pytest.fixture
async def source():
    server = Source()
    app = web.Application(middlewares=[show_errors])
    app.router.add_get("/crl/{name}.crl", server.answer)
    app.on_shutdown.append(server.lists.close)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/crl/fleet.crl"
    yield server
    await runner.cleanup()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "crl" / f"{issuer_hash(CA)}.r0"


@pytest.fixture
def sync(source, file):
    return Sync([source.url], [CA], file.parent)


async def test_a_list_is_written_as_pem_for_all_to_read(source, sync, file):
    made = signed()
    source.publish(made)
    assert (await sync.once()).new
    assert file.read_bytes() == list_pem(made.der)
    assert file.stat().st_mode & 0o777 == 0o644
    assert not (await sync.once()).new
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"<html>", "neither DER nor PEM"),
        (foreign(), "none of the given authorities"),
        (tampered(), "none of the given authorities"),
        (signed(number=6).der, "number 6 is lower than number 7"),
        (signed([CrlEntry("a1", "", NOW)], number=7).der, "number 7 is also that of the list"),
        (signed(number=9, now=NOW - 2 * WEEK).der, "too old"),
        (signed(number=9, now=NOW + timedelta(days=1)).der, "clock is wrong"),
        (signed(number=9).der[:100], "neither DER nor PEM"),
        (extended(point(POINT), critical=False), "brokers would refuse every certificate that does not name it"),
        (extended_entry(11), "cannot be read: reason 11 is not allowed"),
    ],
    ids=by_words,
)
async def test_what_is_not_in_order_leaves_the_list_there(source, sync, file, body, fault):
    made = signed(number=7)
    source.publish(made)
    await sync.once()
    source.body = body
    with pytest.raises(PKIError, match=fault):
        await sync.once()
    assert file.read_bytes() == list_pem(made.der)


async def test_a_half_written_file_is_replaced(source, sync, file):
    made = signed()
    file.parent.mkdir()
    file.write_bytes(list_pem(made.der)[:300])
    source.publish(made)
    assert (await sync.once()).new
    assert file.read_bytes() == list_pem(made.der)


async def test_another_address_is_asked_when_the_first_fails(source, file):
    source.publish(signed())
    other = Sync(["http://127.0.0.1:1/crl/fleet.crl", source.url], [CA], file.parent)
    assert (await other.once()).new
    source.body = b"garbage"
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1.*neither DER"):
        await other.once()


async def test_an_authority_without_a_list_is_told(source, sync):
    with pytest.raises(Unavailable, match="answers 503"):
        await sync.once()
    source.lists.replace({})
    with pytest.raises(Unavailable, match="answers 404"):
        await sync.once()


async def test_a_new_list_is_fetched_at_once_and_a_lost_file_again(source, sync, file):
    source.publish(signed(number=1))
    following = asyncio.create_task(sync.run(0.1))
    try:
        await _until(lambda: file.exists())
        source.requested.clear()
        await source.requested.wait()  # the request is now waiting for the next list
        later = signed([CrlEntry("a1", "", NOW)], number=2)
        source.publish(later)
        await _until(lambda: file.read_bytes() == list_pem(later.der))
        source.requested.clear()
        await source.requested.wait()
        file.unlink()
        last = signed(number=3)
        source.publish(last)
        await _until(lambda: file.exists() and file.read_bytes() == list_pem(last.der))
    finally:
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following


async def test_following_outlives_what_is_wrong(source, sync, file):
    source.body = b"garbage"
    following = asyncio.create_task(sync.run(0.1))
    try:
        await source.requested.wait()
        source.body = None
        source.publish(signed())
        await _until(lambda: file.exists())
        assert not following.done()
    finally:
        following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await following


async def _until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
