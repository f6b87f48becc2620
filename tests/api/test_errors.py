"""The answers of a listener when a handler fails."""

from structlog.testing import capture_logs


async def test_a_bug_is_logged_with_its_place_and_told_without(aiohttp_client, replica):
    """The client learns that the service failed; the details may contain secrets, and are only in the log."""

    def fails():
        raise RuntimeError("secret")

    replica.exposition = fails
    client = await aiohttp_client(replica.health_application())
    with capture_logs() as logged:
        async with client.get("/metrics") as answer:
            assert (answer.status, answer.content_type) == (500, "application/problem+json")
            assert await answer.json() == {
                "title": "InternalError",
                "detail": "RuntimeError in authbackend, see its log",
            }
    assert [(line["event"], line["path"], line["exc_info"]) for line in logged] == [
        ("request.crashed", "/metrics", True)
    ]


async def test_a_wrong_path_is_no_bug(aiohttp_client, replica):
    client = await aiohttp_client(replica.health_application())
    with capture_logs() as logged:
        async with client.get("/nowhere") as answer:
            assert answer.status == 404
    assert not logged
