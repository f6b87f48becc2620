"""What a listener answers when something goes wrong in it."""

from structlog.testing import capture_logs


async def test_a_bug_is_logged_with_its_place_and_told_without(aiohttp_client, replica):
    """Whoever asks learns that it is the service's fault; what was wrong may hold secrets, and is for its log."""

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
