"""What the documentation shows was printed: console examples are run as they are written, and their output is compared."""

import re
import shutil
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from authbackend.pki.ca import AuthorityFolder
from authbackend.policy_file.read import read
from authbackend.postgres import policy_apply
from authbackend.postgres.connection import Target
from tests.support.examples import PAGES, PROMPT, REPO, blocks, matches
from tests.support.postgres import run

from .shell import Shell

SAMPLE = REPO / "authbackend/sample-fleet.yaml"
PASSPHRASE, OF_ROOT = "correct horse battery", "staple in a vault"
ROLES = ("ann", "crl_rabbitmq1")
_numbers = count(1)

# Blocks that no test runs, by the reason in the comment before them.
NOT_EXECUTED = {"changes the host": 5, "needs Docker": 8, "needs a RabbitMQ": 3}


class Scene:
    """
    A page's shell and database.

    Args:
        database: Without it, the page makes its own.
    """

    def __init__(self, postgres, shell, database):
        self.postgres, self.shell, self.database = postgres, shell, database
        self.folder = shell.folder

    def sql(self, statements):
        """Run SQL as the owner of everything."""
        self.postgres.psql(self.database, statements)

    def file(self, name, text):
        """Write a file that the page takes for granted."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def load(self, policy):
        """Make the registry what a policy file says."""
        document, problems = read(policy.read_text(encoding="utf-8"), policy.name)
        assert not problems
        run(policy_apply.apply(Target(self.postgres.dsn(self.database)), document, actor="scene"))

    def create_roles(self):
        """Create the roles of least privilege, and one for a person."""
        self.sql((REPO / "sql/roles.sql").read_text(encoding="utf-8"))
        self.sql("create role ann login in role authbackend_admin")
        return self.postgres.dsn(self.database, "ann")

    def become(self, dsn):
        """Go on as another role."""
        self.shell.do(f"export AUTHBACKEND_DATABASE__DSN='{dsn}' AUTHBACKEND_ACTOR=ann@ops1")


def readme(scene):
    scene.load(SAMPLE)
    shutil.copy(SAMPLE, scene.folder / "fleet.yaml")
    scene.shell.do(
        "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout k -subj /CN=APM0001 -out APM0001.csr"
    )
    scene.shell.instead["docker compose run --rm admin "] = "authbackend "
    empty = f"{scene.database}_empty"
    scene.postgres.psql("postgres", f"create database {empty}")
    scene.shell.here["postgresql://owner@db/authbackend"] = scene.postgres.dsn(empty)


def certificates(scene):
    shell = scene.shell
    scene.load(
        scene.file(
            "policy.yaml",
            'schema: authbackend/1\ndevice_types: {APM: {client_ids: ["{device_id}"], vhosts: ["/"]}}\n'
            "devices: [{device_id: APM0001, type: APM}]\n",
        )
    )
    scene.file("fleet.csv", "device_id,type\nAPM0003,APM\nAPM0004,APM\n")
    shell.here["/srv/ca/certs"] = f"{scene.folder}/srv"
    shell.here["/etc/rabbitmq"] = f"{scene.folder}/etc/rabbitmq"
    shell.instead["-in fleet-root.key"] = "-in /media/usb/fleet-root.key"
    shell.typed["openssl pkcs8"] = f"{OF_ROOT}\nanother for the root\nanother for the root\n"

    def enroll_again():
        shell.do("authbackend device enroll APM0001 --ca pki --csr APM0001.csr --out second")

    def another_authority():
        issuer, key = Issued.authority("CN=Plant authority")
        scene.file("ca.pem", issuer.pem)
        scene.file("srv/one.pem", Issued("APM0001", 0x51, issuer.name, key).pem)
        scene.file("stream.pem", Issued("APM0003", 0x52, issuer.name, key).pem)
        scene.file("newcerts/53.pem", Issued("APM0004", 0x53, issuer.name, key).pem)
        scene.file("index.txt", "R\t361125000000Z\t261101000000Z,keyCompromise\t53\tunknown\t/CN=APM0004\n")
        scene.file("bin/export-them", "#!/bin/sh\ncat stream.pem\n").chmod(0o755)

    def known_numbers():
        authority = AuthorityFolder.open(scene.folder / "pki", PASSPHRASE.encode())
        for serial in (0x1A2B3C, 0x1A2B3D):
            issued = Issued("APM0001", serial, authority.certificate.subject, authority._key)
            scene.file(f"{serial:x}.pem", issued.pem)
        shell.do("authbackend cert import 1a2b3c.pem 1a2b3d.pem")

    def broker_host():
        for folder in ("certs", "crl"):
            (scene.folder / "etc/rabbitmq" / folder).mkdir(parents=True)
        shutil.copy(scene.folder / "pki/ca.pem", scene.folder / "etc/rabbitmq/certs")
        shell.start("authbackend serve")
        for replica in ("replica1", "replica2"):
            shell.here[f"http://{replica}:8082"] = shell.here["http://127.0.0.1:8082"]

    def report():
        scene.sql((REPO / "sql/roles.sql").read_text(encoding="utf-8"))
        scene.sql("create role crl_rabbitmq1 login in role authbackend_crl_sync")
        shell.do(
            "authbackend crl sync --once --node rabbit@rabbitmq1 --url http://replica1:8082/crl/fleet.crl"
            " --ca /etc/rabbitmq/certs/ca.pem --dir /etc/rabbitmq/crl",
            AUTHBACKEND_DATABASE__DSN=scene.postgres.dsn(scene.database, "crl_rabbitmq1"),
        )

    shell.before.update(
        {
            "authbackend cert revoke --device APM0001 --all-but-newest": enroll_again,
            "authbackend cert import /srv/ca/certs": another_authority,
            "authbackend cert list --expiring": known_numbers,
            "authbackend crl sync": broker_host,
            "authbackend crl hosts": report,
        }
    )


class Issued:
    """A certificate of another authority, or of one whose key the test has, with a serial number that a page can name."""

    def __init__(self, name, serial, issuer, key, *, of=None, authority=False):
        now = datetime.now(UTC)
        public = (of or ec.generate_private_key(ec.SECP256R1())).public_key()
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.name)
            .issuer_name(issuer or self.name)
            .public_key(public)
            .serial_number(serial)
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(days=20))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        self.pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    @classmethod
    def authority(cls, name):
        """Make an authority: its certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(name.removeprefix("CN="), 1, None, key, of=key, authority=True), key


def enforcement(scene):
    scene.become(scene.create_roles())


def load_testing(scene):
    scene.shell.instead["--count 5000 --revoked 50"] = "--count 20 --revoked 2"


def operations(scene):
    scene.load(SAMPLE)
    for name in ("authbackend1", "authbackend2"):
        scene.shell.do(f"export AUTHBACKEND_REPLICA__NAME={name}")
        scene.shell.start("authbackend serve")


def policy_file(scene):
    scene.sql(
        "insert into device_type (name, client_ids, vhosts)"
        " select name, array['{device_id}'], array['/'] from unnest(array['APM', 'AGV']) as name;"
        "insert into topic_rule (device_type, effect, action, topic)"
        " select name, 'allow', 'publish', 'fleet/{device_id}/#' from device_type;"
        "insert into device (device_id, type)"
        " select 'APM' || to_char(n, 'FM0000'), 'APM' from generate_series(1, 1181) n"
        " union select 'AGV' || to_char(n, 'FM0000'), 'AGV' from generate_series(1, 23) n"
    )
    of_type = '  {}:\n    client_ids: ["{{device_id}}"]\n    vhosts: ["/"]\n    rules: [{{effect: allow, action: publish, topic: "fleet/{{device_id}}/{}"}}]\n'
    kept = "".join(f"  - {{device_id: AGV{n:04d}, type: AGV}}\n" for n in range(1, 24))
    types = of_type.format("APM", "#") + of_type.format("AGV", "state/#")
    scene.file("fleet.yaml", f"schema: authbackend/1\ndevice_types:\n{types}devices:\n{kept}")


def security(scene):
    scene.load(SAMPLE)
    scene.become(scene.create_roles())
    scene.shell.do("authbackend device suspend AGV0001 --reason service")


def tutorial(scene):
    (policy,) = [block.text for block in blocks(REPO / "docs/tutorial.md") if block.language == "yaml"]
    scene.file("fleet.yaml", policy)


SCENES = {
    "README.md": readme,
    "docs/certificates.md": certificates,
    "docs/enforcement.md": enforcement,
    "docs/load-testing.md": load_testing,
    "docs/operations.md": operations,
    "docs/policy-file.md": policy_file,
    "docs/security.md": security,
    "docs/tutorial.md": tutorial,
}


@pytest.fixture
def folder():
    """A folder that the user whom PostgreSQL runs as may enter, too."""
    with tempfile.TemporaryDirectory(prefix="authbackend-docs-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def scene(page, folder, tmp_path, postgres, migrated_template):
    database = f"page_{next(_numbers)}"
    postgres.psql("postgres", f"create database {database} template {migrated_template}")
    variables = {
        "AUTHBACKEND_CA_PASSPHRASE": PASSPHRASE,
        "AUTHBACKEND_CA_ROOT_PASSPHRASE": OF_ROOT,
        **{f"AUTHBACKEND_{listener}__LISTEN": "127.0.0.1:0" for listener in ("BROKER", "ADMIN", "HEALTH")},
    }
    if page != "docs/tutorial.md":  # which starts a PostgreSQL of its own
        variables["AUTHBACKEND_DATABASE__DSN"] = postgres.dsn(database)
    shell = Shell(folder, tmp_path, variables, [postgres.bin])
    shell.here["/media/usb"] = f"{folder}/media/usb"
    (folder / "media/usb").mkdir(parents=True)
    (folder / "bin").mkdir()
    try:
        yield Scene(postgres, shell, database)
    finally:
        shell.close()
        for name in (database, f"{database}_empty"):
            postgres.psql("postgres", f"drop database if exists {name} with (force)")
        for role in ROLES:
            postgres.psql("postgres", f"drop role if exists {role}")


def console_blocks():
    return [block for page in PAGES for block in blocks(page) if block.language == "console"]


@pytest.mark.parametrize("page", SCENES)
def test_every_command_prints_what_the_page_shows(page, scene):
    SCENES[page](scene)
    ran = 0
    for block in console_blocks():
        if block.page != page or block.mark:
            continue
        for example in block.examples:
            ended, printed = scene.shell.run(example.prompt, example.command)
            shown = f"{page}: {example.prompt} {example.command}\n{printed}"
            if example.expected:
                assert matches(example.expected, printed), shown
            else:  # the page does not say what it prints, only that it works
                assert ended == 0, shown
            ran += 1
    assert ran > 0


@pytest.mark.parametrize("page", ["docs/tutorial.md"])
def test_make_run_prints_three_lines_to_try(scene):
    """README.md says so; make would install a virtual environment first."""
    command = "authbackend serve --embedded .data --sample"
    assert f"$(BIN)/{command}\n" in (REPO / "Makefile").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^  (\w+): +(curl .+)$", scene.shell.start(command), re.MULTILINE))
    assert scene.shell.do(f"{lines.pop('allowed')} -s") == "allow"
    assert scene.shell.do(f"{lines.pop('denied')} -s") == "deny"
    assert '"no_rule_allows"' in scene.shell.do(f"{lines.pop('explain')} -s")
    assert lines == {}


def test_every_block_is_executed_or_says_why_not():
    marks = [block for block in console_blocks() if block.mark]
    assert {block.page for block in console_blocks() if not block.mark} == set(SCENES)
    not_executed = Counter(block.mark for block in marks if block.mark.startswith("not "))
    assert not_executed == {f"not executed: {reason}": number for reason, number in NOT_EXECUTED.items()}


def test_a_block_that_another_test_executes_is_read_by_it():
    elsewhere = [block for block in console_blocks() if block.mark.startswith("executed: ")]
    assert len(elsewhere) > 3
    for block in elsewhere:
        test = (REPO / block.mark.removeprefix("executed: ")).read_text(encoding="utf-8")
        assert f'"{block.page}"' in test, block.text


def test_every_mark_stands_before_a_block():
    for page in PAGES:
        written = re.findall(r"<!-- (?:not )?executed", page.read_text(encoding="utf-8"))
        assert len(written) == len([one for one in blocks(page) if one.mark and one.language == "console"]), page


def test_a_block_with_commands_is_a_console_block():
    shown = [
        block for page in PAGES for block in blocks(page) if block.language != "console" and PROMPT.search(block.text)
    ]
    assert shown == []
