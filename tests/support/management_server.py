"""RabbitMQ's management API in front of a cluster in memory, for the real client, here or in another process."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from authbackend.enforcement.management_api import CallRefused, ClusterUnreachable, LiveConnection, Queue
from tests.support.memory_cluster import Broker, MemoryCluster


def application(broker: Broker) -> web.Application:
    """Return the web application of one cluster's management API."""
    app = web.Application(middlewares=[_answer_errors_as_broker])
    app.add_routes(_Server(broker).routes())
    return app


@web.middleware
async def _answer_errors_as_broker(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except CallRefused:
        return web.json_response({"error": "internal error"}, status=500)
    except ClusterUnreachable:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


class _Server:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._cluster = MemoryCluster(broker)

    def routes(self) -> list[web.RouteDef]:
        user, connection, queue = (
            "/api/connections/username/{user}",
            "/api/connections/{name}",
            "/api/queues/{vhost}/{queue}",
        )
        return [
            web.get("/api/nodes", self.nodes),
            web.get("/api/connections", self.connections),
            web.get(user, self.connections_of),
            web.delete(user, self.close_user),
            web.get(connection, self.details),
            web.delete(connection, self.close_connection),
            web.get("/api/queues", self.queues),
            web.get(queue + "/bindings", self.bindings),
            web.post(queue + "/get", self.messages),
            web.delete(queue, self.delete_queue),
            web.get("/api/bindings/{vhost}", self.all_bindings),
            web.delete("/api/bindings/{vhost}/e/{exchange}/q/{queue}/{key}", self.unbind),
        ]

    async def nodes(self, _: web.Request) -> web.Response:
        return web.json_response([{"name": name, "running": up} for name, up in (await self._cluster.nodes()).items()])

    async def connections(self, _: web.Request) -> web.Response:
        return web.json_response([_entry(each) async for part in self._cluster.connections() for each in part])

    async def connections_of(self, request: web.Request) -> web.Response:
        found = await self._cluster.connections_of(request.match_info["user"])
        return web.json_response([{"name": each.name, "node": each.node, "user": each.user} for each in found])

    async def close_user(self, request: web.Request) -> web.Response:
        await self._cluster.close_user(request.match_info["user"])
        return web.Response(status=204)

    async def details(self, request: web.Request) -> web.Response:
        found = await self._cluster.details(request.match_info["name"])
        return _missing() if found is None else web.json_response(_entry(found))

    async def close_connection(self, request: web.Request) -> web.Response:
        closed = await self._cluster.close_connection(request.match_info["name"])
        return web.Response(status=204) if closed else _missing()

    async def queues(self, request: web.Request) -> web.Response:
        pattern = request.query.get("name")
        found = [
            {"vhost": each.vhost, "name": each.name, "messages": each.messages}
            async for part in self._cluster.queues(pattern)
            for each in part
        ]
        return web.json_response(found if pattern is None else {"page_count": 1, "items": found})

    async def bindings(self, request: web.Request) -> web.Response:
        queue = _queue(request)
        if (queue.vhost, queue.name) not in self._broker.queues:
            await self._cluster.bindings(queue)
            return _missing()
        found = await self._cluster.bindings(queue)
        default = {"source": "", "routing_key": queue.name, "properties_key": queue.name}
        return web.json_response(
            [default, *({"source": b.source, "routing_key": b.routing_key, "properties_key": b.key} for b in found)]
        )

    async def all_bindings(self, request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "source": binding.source,
                    "destination": name,
                    "destination_type": "queue",
                    "routing_key": binding.routing_key,
                    "properties_key": binding.key,
                }
                async for part in self._cluster.all_bindings(request.match_info["vhost"])
                for name, binding in part
            ]
        )

    async def messages(self, request: web.Request) -> web.Response:
        queue = _queue(request)
        empty = await self._cluster.is_empty(queue)
        if (queue.vhost, queue.name) not in self._broker.queues:
            return _missing()
        return web.json_response([] if empty else [{"payload": "x"}])

    async def delete_queue(self, request: web.Request) -> web.Response:
        known = (queue := _queue(request)).name in {name for _, name in self._broker.queues}
        await self._cluster.delete_queue(queue)
        return web.Response(status=204) if known else _missing()

    async def unbind(self, request: web.Request) -> web.Response:
        queue, key = _queue(request), request.match_info["key"]
        found = [each for each in self._broker.bound.get((queue.vhost, queue.name), {}).values() if each.key == key]
        if not found:
            await self._cluster.bindings(queue)
            return _missing()
        await self._cluster.unbind(queue, found[0])
        return web.Response(status=204)


def _queue(request: web.Request) -> Queue:
    return Queue(request.match_info["vhost"], request.match_info["queue"], 0)


def _missing() -> web.Response:
    return web.json_response({"error": "Object Not Found"}, status=404)


def _entry(live: LiveConnection) -> dict[str, Any]:
    """Return a connection as an entry of RabbitMQ's list of connections."""
    return {
        "name": live.name,
        "node": live.node,
        "user": live.user,
        "vhost": live.vhost,
        "protocol": live.protocol,
        "peer_host": live.address,
        "client_properties": {"client_id": live.client_id, "user_property": live.user_properties},
        "connected_at": round(live.connected_at * 1000),
        "peer_cert_serial_number": live.certificate_serial,
        "peer_cert_issuer": live.certificate_issuer,
        "peer_cert_subject": live.certificate_subject,
        "peer_cert_validity": live.certificate_validity,
    }
