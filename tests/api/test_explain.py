"""The endpoint ``/api/explain``: the current verdict and its reason, only from this host."""

import pytest

PATH = "/api/explain"
ASKED = {"device": "APM0001", "action": "publish", "topic": "fleet/APM0001/telemetry/speed"}


@pytest.fixture
async def client(aiohttp_client, replica):
    """A client of the replica's admin listener."""
    return await aiohttp_client(replica.application())


async def explained(client, status=200, headers=None, **changes):
    parameters = {name: value for name, value in {**ASKED, **changes}.items() if value is not None}
    async with client.get(PATH, params=parameters, headers=headers) as answer:
        assert answer.status == status, await answer.text()
        assert answer.content_type == ("application/json" if status == 200 else "application/problem+json")
        return await answer.json(content_type=None)


async def test_an_allowed_publish_names_its_rule(client):
    explanation = await explained(client)
    assert (explanation["verdict"], explanation["device"], explanation["device_type"]) == ("allow", "APM0001", "APM")
    assert explanation["routing_key"] == "fleet.APM0001.telemetry.speed"
    assert (explanation["rule"]["id"], explanation["rule"]["effect"], explanation["rule"]["action"]) == (
        1,
        "allow",
        "publish",
    )


async def test_a_deny_rule_is_named_as_the_one_that_decided(client):
    explanation = await explained(client, topic="fleet/APM0001/telemetry/raw")
    assert (explanation["verdict"], explanation["reason"], explanation["rule"]["id"]) == ("deny", "rule_denies", 2)


async def test_what_no_rule_allows_names_the_nearest(client):
    explanation = await explained(client, topic="fleet/APM0002/telemetry/speed")
    assert (explanation["verdict"], explanation["reason"], explanation["rule"]) == ("deny", "no_rule_allows", None)
    assert explanation["nearest"][0]["missing"] == 'level 2 is "APM0002", the rule wants "APM0001"'


async def test_a_device_is_found_by_its_id_and_by_its_common_name(client):
    for name in ("APM0009", "gone"):
        explanation = await explained(client, device=name)
        assert (explanation["device"], explanation["status"]) == ("APM0009", "revoked")
        assert (explanation["verdict"], explanation["reason"], explanation["decided_at"]) == (
            "deny",
            "device_revoked",
            "login",
        )


async def test_a_subscription_is_judged_by_the_rules_for_subscriptions(client):
    assert (await explained(client, action="subscribe"))["verdict"] == "deny"
    assert (await explained(client, action="subscribe", topic="fleet/APM0001/commands/#"))["verdict"] == "allow"


async def test_client_id_and_vhost_count_when_they_are_given(client):
    assert (await explained(client))["client_id"] == "APM0001"
    explanation = await explained(client, client_id="APM0002")
    assert (explanation["verdict"], explanation["reason"]) == ("deny", "client_id_not_bound")
    explanation = await explained(client, vhost="plant")
    assert (explanation["verdict"], explanation["vhost"], explanation["decided_at"]) == ("deny", "plant", "vhost")


@pytest.mark.parametrize(
    ("changes", "status", "title", "detail"),
    [
        ({"device": None}, 400, "InvalidInput", "missing: device; try ?device="),
        ({"device": None, "action": None, "topic": None}, 400, "InvalidInput", "missing: device, action, topic"),
        ({"action": "write"}, 400, "InvalidInput", "action must be one of: publish, subscribe"),
        ({"device": "nobody"}, 404, "NotFound", "no device has the id or common name 'nobody'"),
        ({"device": ""}, 404, "NotFound", "no device has the id or common name ''"),
        ({"device": "x" * 5000}, 404, "NotFound", "no device has the id or common name"),
    ],
)
async def test_what_cannot_be_explained_is_a_problem_with_its_reason(client, changes, status, title, detail):
    problem = await explained(client, status, **changes)
    assert problem["title"] == title
    assert problem["detail"].startswith(detail)


@pytest.mark.parametrize("topic", ["", "fleet/#/x", "a\x00b", "x" * 70_000])
async def test_a_topic_that_no_device_could_publish_to_is_answered_and_never_allowed(aiohttp_client, replica, topic):
    client = await aiohttp_client(replica.application(), server_kwargs={"max_line_size": 100_000})
    async with client.get(PATH, params={**ASKED, "topic": topic}) as answer:
        assert answer.status in (200, 400, 414), await answer.text()
        assert answer.status != 200 or (await answer.json())["verdict"] == "deny"


async def test_before_the_first_load_it_is_unavailable(aiohttp_client, empty):
    problem = await explained(await aiohttp_client(empty.application()), 503)
    assert problem == {"title": "Unavailable", "detail": "the registry has not been loaded yet"}


async def test_it_is_not_there_when_others_could_reach_it(aiohttp_client, replica):
    client = await aiohttp_client(replica.application(loopback=False))
    async with client.get(PATH, params=ASKED) as answer:
        assert answer.status == 404


@pytest.mark.parametrize("path", ["/metrics", "/health/live", "/health/ready", "/crl/fleet.crl"])
async def test_who_asks_here_for_health_metrics_or_lists_is_told_where_they_are(client, path):
    async with client.get(path) as answer:
        problem = await answer.json(content_type=None)
    assert (answer.status, problem["title"]) == (404, "NotFound")
    assert problem["detail"] == f"{path} is served by another listener: health.listen (port 8082 by default)"


@pytest.mark.parametrize("host", ["localhost", "localhost:8081", "127.0.0.1:1", "[::1]", "[::1]:8081"])
async def test_the_names_of_this_host_are_answered(client, host):
    await explained(client, headers={"Host": host})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8081", "127.0.0.1.evil.example", "localhost.evil", "::1"]
)
async def test_a_web_page_that_points_its_own_name_here_is_refused(client, host):
    async with client.get(PATH, params=ASKED, headers={"Host": host}) as answer:
        assert answer.status == 421
        assert "APM" not in await answer.text()
