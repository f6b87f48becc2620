"""
Requests recorded from real brokers, replayed over HTTP; each answer is checked against the expectation computed here.

The expectations follow from the scenario alone, by the rules below, independent of the code under test. Client ids that
the recorded clients chose freely (``tc``, ``a/b``) are moved into their device's pattern (``APM0001_tc``), except in
the scenarios about theft and impersonation, which keep the raw bytes.
"""

import json
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import pytest

from tests.service.conftest import HASH, apply, running, until

TRACES = sorted((Path(__file__).parent.parent / "cases" / "traces").glob("*.ndjson"))

POLICY = f"""
schema: authbackend/1
device_types:
  APM:
    client_ids: ["{{device_id}}", "{{device_id}}_*"]
    vhosts: ["/"]
    rules:
      - {{effect: allow, action: publish, topic: "#"}}
      - {{effect: deny, action: publish, topic: "secret/#"}}
      - {{effect: allow, action: subscribe, topic: "fleet/#"}}
      - {{effect: allow, action: subscribe, topic: "a/#"}}
      - {{effect: deny, action: subscribe, topic: "fleet/secret/#"}}
devices:
  - {{device_id: APM0001, type: APM}}
  - {{device_id: APM0002, type: APM}}
accounts:
  - name: svc
    login: password
    password_hash: "{HASH}"
    vhosts: ["/"]
    permissions: {{configure: ["q*", "ex*"], write: ["q*", "ex*", "amq.topic"], read: ["q*", "amq.topic"]}}
    unchecked_dead_lettering: true
    rules: [{{effect: allow, action: publish, topic: "ok/key"}}]
  - {{name: op, login: password, password_hash: "{HASH}", tags: [administrator], vhosts: ["/"]}}
"""
DEVICES = ("APM0001", "APM0002")
AS_RECORDED = ("session-theft", "none-password", "cert-login-from", "cert-cn-odd", "client-id-bound", "web-mqtt-mtls")


def bound(form):
    """Move a device's freely chosen client id into its pattern."""
    device = form.get("username")
    client_id = form.get("client_id") or form.get("variable_map.client_id")
    if device not in DEVICES or not client_id or client_id in DEVICES:
        return form
    own = f"{device}_{client_id}"
    moved = {name: own if name.endswith("client_id") else value for name, value in form.items()}
    for prefix in ("mqtt-subscription-", "mqtt-will-"):
        if form.get("name", "").startswith(prefix + client_id):
            moved["name"] = prefix + own + form["name"][len(prefix + client_id) :]
    return moved


def justified(path, form):
    """Return the answer that each request must get, and a sentence with the reason."""
    name = form["username"]
    client_id = form.get("client_id") or form.get("variable_map.client_id")
    if name in DEVICES:
        return of_device(path, form, name, client_id)
    if name in ("svc", "op"):
        return of_account(path, form, name, client_id)
    return "deny", "the name is nobody's in the registry"


def of_device(path, form, name, client_id):
    own = client_id is not None and (client_id == name or client_id.startswith(f"{name}_"))
    if path == "/auth/user":
        if "password" in form:
            return "deny", "a device has no password"
        if client_id is not None and not own:
            return "deny", "the client id is not the device's"
        return "allow", "the certificate of an active device"
    if client_id is None:
        return "deny", "a device speaks MQTT only"
    if not own:
        return "deny", "the client id is not the device's"
    if path == "/auth/vhost":
        return "allow", "the vhost is in the type's list"
    if path == "/auth/resource":
        return device_resource(form, client_id)
    return device_topic(form)


def device_resource(form, client_id):
    if form["resource"] == "queue":
        queues = [f"mqtt-subscription-{client_id}qos0", f"mqtt-subscription-{client_id}qos1", f"mqtt-will-{client_id}"]
        return ("allow", "its own queue") if form["name"] in queues else ("deny", "not its own queue")
    if form["name"] == "amq.topic" and form["permission"] in ("write", "read"):
        return "allow", "some rule could allow it"
    if form["name"] == "amq.default" and form["permission"] == "write":
        return "allow", "a delayed will is stored through it"
    return "deny", "a device reaches no other exchange"


def device_topic(form):
    words = form["routing_key"].split(".") if form["routing_key"] else []
    if form["permission"] == "write":
        if words[:1] == ["secret"]:
            return "deny", "the deny rule secret/#"
        return "allow", "the allow rule #; wildcards in a key are plain words"
    if words[:1] == ["a"]:
        return "allow", "inside a/#"
    if words[:1] != ["fleet"]:
        return "deny", "in no allow rule"
    if len(words) > 1 and words[1] in ("secret", "*", "#"):
        return "deny", "overlaps the deny rule fleet/secret/#"
    return "allow", "inside fleet/#"


def of_account(path, form, name, client_id):
    if client_id is not None and path != "/auth/user":
        return "deny", "the account lists no client ids"
    if path == "/auth/user":
        if "password" not in form:
            return "deny", "the account logs in by password"
        if form["password"] != "correct horse" or client_id is not None:
            return "deny", "a wrong password, or MQTT without a listed client id"
        return ("allow administrator", "its tags") if name == "op" else ("allow", "its password, no tags")
    if path == "/auth/vhost":
        return "allow", "the vhost is in its list"
    if name == "op":
        return "deny", "it has no permissions"
    return svc_permission(path, form)


def svc_permission(path, form):
    if path == "/auth/resource":
        own = form["name"].startswith("q") or (form["name"].startswith("ex") and form["permission"] != "read")
        exchange = form["name"] == "amq.topic" and form["permission"] in ("write", "read")
        return ("allow", "a name it lists") if own or exchange else ("deny", "a name it does not list")
    if form["name"] == "amq.topic" and form["permission"] == "write" and form["routing_key"] in ("ok.key",):
        return "allow", "its rule ok/key"
    return "deny", "no rule of the account on that exchange"


@pytest.fixture
async def service(dsn):
    await apply(dsn, POLICY)
    async with running(dsn) as started:
        yield started


async def decided(service, question, form):
    """Repeat a request until there is a decision: on a busy machine, a request that waits too long is answered 503."""

    async def answered():
        answer = await service.ask(question, form)
        return answer if answer[0] != 503 else None

    return await until(answered, f"{question} {form} is decided")


async def replay(service, trace):
    """Send each line; return the expected answer, the answer, and the reason."""
    results = []
    for line in trace.read_text(encoding="utf-8").splitlines():
        recorded = json.loads(line)
        form = dict(parse_qsl(recorded["raw"], keep_blank_values=True))
        raw = recorded["raw"]
        if not any(part in trace.name for part in AS_RECORDED):
            form = bound(form)
            if form.get("username") in ("svc", "op") and form.get("password") in ("secret", "guest"):
                form["password"] = "correct horse"  # the password of the recorded account in this registry
            raw = urlencode(form)
        expected, why = justified(recorded["path"], form)
        status, answered = await decided(service, recorded["path"].rsplit("/", 1)[1], raw)
        results.append((recorded["step"], raw, why, expected, answered if status == 200 else status))
    return results


async def test_every_recorded_request_gets_its_justified_answer(service):
    totals = Counter()
    for trace in TRACES:
        for step, raw, why, expected, answered in await replay(service, trace):
            assert answered == expected, f"{trace.name}, step {step!r}: {raw}: {why}"
            totals[why] += 1
    assert sum(totals.values()) == 2162
    assert len(TRACES) == 73
    for why in ("a device has no password", "the client id is not the device's", "its own queue", "inside fleet/#"):
        assert totals[why] > 10, why
    assert await service.metric("authbackend_malformed_requests_total") == 0


async def test_a_device_that_may_everything_is_never_denied_what_its_connection_needs(dsn):
    """All requests of RabbitMQ 4.3 during a connection."""
    open_rules = POLICY.replace(
        'effect: deny, action: publish, topic: "secret/#"', 'effect: allow, action: subscribe, topic: "#"'
    )
    await apply(
        dsn,
        open_rules.replace(
            'effect: deny, action: subscribe, topic: "fleet/secret/#"', 'effect: allow, action: publish, topic: "b"'
        ),
    )
    requests = 0
    async with running(dsn) as service:
        for name in (
            "4.3.6-mqtt5-will",
            "4.3.6-mqtt5-durable",
            "4.3.6-mqtt4-durable",
            "4.3.6-mqtt5-cert",
            "4.3.6-mqtt5-topics",
        ):
            trace = next(path for path in TRACES if path.stem == name)
            for line in trace.read_text(encoding="utf-8").splitlines():
                recorded = json.loads(line)
                form = bound(dict(parse_qsl(recorded["raw"], keep_blank_values=True)))
                if form["username"] in DEVICES and "password" not in form:
                    requests += 1
                    question = recorded["path"].rsplit("/", 1)[1]
                    assert await decided(service, question, urlencode(form)) == (200, "allow"), recorded
    assert requests == 125
