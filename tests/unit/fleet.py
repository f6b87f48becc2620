"""A small registry for tests of decisions."""

from authbackend.policy.model import Account, Device, DeviceType, Login, RuleSet, Status
from authbackend.policy.names import DeviceId
from authbackend.policy.networks import Networks
from authbackend.policy.rules import Effect, Permission, TopicRule
from tests.support.memory_registry import MemoryRegistry

NOW = 1_800_000_000.0


def rule(effect, permission, topic, exchange=None):
    return TopicRule(Effect(effect), Permission(permission), topic, rule_id=1, exchange=exchange)


def device(device_id, type_="APM", **values):
    return Device(DeviceId(device_id), values.pop("common_name", device_id), type_, **values)


APM = DeviceType(
    "APM",
    client_ids=("{device_id}", "{device_id}_*"),
    vhosts=("/",),
    rules=RuleSet(
        [
            rule("allow", "write", "fleet/{device_id}/telemetry/#"),
            rule("deny", "write", "fleet/{device_id}/telemetry/raw/#"),
            rule("allow", "read", "fleet/{device_id}/commands/#"),
            rule("deny", "read", "fleet/+/secrets/#"),
        ]
    ),
)
TIED = DeviceType(
    "TIED", client_ids=("{device_id}",), vhosts=("/", "plant"), networks=Networks.parse(["10.20.0.0/16", "::1/128"])
)
MUTE = DeviceType("MUTE", client_ids=("{device_id}",), vhosts=("/",))


def registry(*devices, accounts=(), types=(APM, TIED, MUTE), age_s=0.0):
    return MemoryRegistry(devices, types, accounts, age_s)


def account(name, **values):
    values.setdefault("login", Login.PASSWORD)
    values.setdefault("password_hash", "$argon2id$x")
    values.setdefault("vhosts", ("/",))
    return Account(name, **values)


FLEET = registry(
    device("APM0001"),
    device("APM0002"),
    device("APM"),
    device("APM_1"),
    device("OFF_9", status=Status.REVOKED),
    device("OFF"),
    device("CN1", common_name="cn one"),
    device("PENDING", status=Status.PENDING),
    device("SUSPENDED", status=Status.SUSPENDED),
    device("REVOKED", status=Status.REVOKED),
    device("EXPIRED", expires_at=NOW),
    device("SOON", expires_at=NOW + 1),
    device("ORPHAN", "GONE"),
    device("TIED1", "TIED"),
    device("MUTE1", "MUTE"),
    accounts=(
        account("monitoring", tags=("monitoring",)),
        account("mqtt-service", client_ids=("service-1", "APM0001_x"), vhosts=("/",)),
        account(
            "amqp-machine",
            login=Login.CERTIFICATE,
            password_hash=None,
            configure=("app.*",),
            write=("app.*", "events"),
            read=("app.*", "mqtt-subscription-APM0001qos1"),
            unchecked_dead_lettering=True,
            rules=RuleSet([rule("allow", "write", "app/#", "events"), rule("allow", "read", "fleet/#")]),
        ),
        account("dead-letters", configure=("q",), write=("*",)),
    ),
)
