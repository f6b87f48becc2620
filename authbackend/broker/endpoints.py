"""The four endpoints that RabbitMQ asks, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from authbackend.broker import wire
from authbackend.broker.passwords import Busy, PasswordChecker
from authbackend.broker.wire import Malformed, MalformedRequest
from authbackend.logs import Sampler
from authbackend.metrics import Metrics
from authbackend.policy import decide
from authbackend.policy.decide import Decision, PasswordCheck
from authbackend.policy.reasons import Reason
from authbackend.registry.snapshot import Snapshot
from authbackend.registry.sync import RegistryCopy

log = structlog.get_logger(__name__)

_LONGEST_LOGGED = 256
_STALE = Decision(False, Reason.REGISTRY_STALE)
_MALFORMED = Decision(False, Reason.MALFORMED_REQUEST)


@dataclass(frozen=True, slots=True)
class _Question:
    """One endpoint: how its request is read and how it is decided."""

    name: str
    parse: Callable[[dict[str, str]], Any]
    decide: Callable[[Snapshot, Any, float, decide.Rules], Decision | PasswordCheck]


QUESTIONS = {
    f"/auth/{question.name}": question
    for question in (
        _Question("user", wire.login_request, lambda copy, request, now, _: decide.login(copy, request, now)),
        _Question("vhost", wire.vhost_request, lambda copy, request, now, _: decide.vhost(copy, request, now)),
        _Question("resource", wire.resource_request, decide.resource),
        _Question("topic", wire.topic_request, decide.topic),
    )
}


class Endpoints:
    """
    Answers RabbitMQ: 200 with ``allow``, ``allow TAGS`` or ``deny``; 503 when this service itself fails.

    Args:
        request_timeout_s: Longest time from a request's head to its answer.
        deny_reasons: Answer ``deny REASON``; for RabbitMQ 4.3 and later.
    """

    def __init__(
        self,
        copy: RegistryCopy,
        passwords: PasswordChecker,
        metrics: Metrics,
        sampler: Sampler,
        rules: decide.Rules,
        *,
        request_timeout_s: float = 1.0,
        deny_reasons: bool = False,
    ) -> None:
        self._copy = copy
        self._passwords = passwords
        self._metrics = metrics
        self._sampler = sampler
        self._rules = rules
        self._timeout_s = request_timeout_s
        self._deny_reasons = deny_reasons

    async def answer(self, question: _Question, request: web.BaseRequest) -> web.Response:
        """Answer one request; never raises but for cancellation."""
        started = time.monotonic()
        self._metrics.in_flight.inc()
        try:
            return await self._answer(question, request, started + self._timeout_s)
        except TimeoutError:
            return self._failed(question.name, "timeout")
        except ConnectionError:
            return self._failed(question.name, "connection_lost")
        except Exception as error:
            log.error("broker.request_crashed", endpoint=question.name, error=type(error).__name__, exc_info=True)
            return self._failed(question.name, "crash")
        finally:
            self._metrics.in_flight.dec()
            self._metrics.answered(question.name, time.monotonic() - started)

    def malformed(self, endpoint: str, cause: Malformed) -> web.Response:
        """Deny a request that is not RabbitMQ's, and count why."""
        self._metrics.malformed.labels(endpoint, cause).inc()
        self._metrics.decided(endpoint, _MALFORMED)
        admitted, suppressed = self._sampler.admit(f"\x00{cause}")
        if admitted:
            log.info("malformed", endpoint=endpoint, cause=str(cause), unlogged=suppressed)
        return web.Response(text=wire.answer(_MALFORMED, with_reason=self._deny_reasons))

    async def _answer(self, question: _Question, request: web.BaseRequest, deadline: float) -> web.Response:
        try:
            parsed = question.parse(wire.parse_form(await _form(request, deadline)))
        except MalformedRequest as fault:
            return self.malformed(question.name, fault.cause)
        snapshot = self._copy.snapshot
        if snapshot is None:
            return self._failed(question.name, "not_ready")
        if self._copy.stale:
            decision = _STALE
        else:
            outcome = question.decide(snapshot, parsed, time.time(), self._rules)
            if isinstance(outcome, Decision):
                decision = outcome
            else:
                async with asyncio.timeout_at(_loop_time(deadline)):
                    decision = await self._checked(outcome, parsed.password)
        self._metrics.decided(question.name, decision)
        if decision.allowed:
            log.debug("allowed", endpoint=question.name, name=parsed.username)
        else:
            self._log_denial(question.name, parsed, decision)
        return web.Response(text=wire.answer(decision, with_reason=self._deny_reasons))

    async def _checked(self, check: PasswordCheck, password: str) -> Decision:
        try:
            right = await self._passwords.check(check.account, password)
        except Busy:
            return Decision(False, Reason.PASSWORD_CHECKS_BUSY, check.otherwise.kind)
        if not right:
            return check.otherwise
        snapshot = self._copy.snapshot
        if check.account is None or snapshot is None or snapshot.account(check.account.name) != check.account:
            return check.otherwise  # the account changed while its password was being checked
        return check.then

    def _failed(self, endpoint: str, cause: str) -> web.Response:
        self._metrics.failures.labels(endpoint, cause).inc()
        response = web.Response(status=503, text="unavailable")
        if cause in ("timeout", "connection_lost"):
            response.force_close()  # the rest of the body may still come
        return response

    def _log_denial(self, endpoint: str, request: Any, decision: Decision) -> None:
        admitted, suppressed = self._sampler.admit(request.username)
        if suppressed:
            log.info("denials_not_logged", number=suppressed)
        if not admitted:
            return
        facts = {"device": request.username, "client_id": request.client_id}
        for field in ("vhost", "ip", "resource", "name", "permission", "routing_key"):
            value = getattr(request, field, None)
            if value is not None:
                facts["address" if field == "ip" else field] = value
        rule = decision.rule
        log.info(
            "denied",
            endpoint=endpoint,
            reason=str(decision.reason),
            rule=rule.rule_id if rule else None,
            kind=decision.kind,
            **{name: value and value[:_LONGEST_LOGGED] for name, value in facts.items()},
        )


def _loop_time(deadline: float) -> float:
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


async def _form(request: web.BaseRequest, deadline: float) -> bytes:
    """Return the form that carries the parameters: the body of a POST, the query of a GET."""
    if request.method == "POST":
        try:
            if request.content.is_eof():  # nearly always: the body came with the head
                return await request.read()
            async with asyncio.timeout_at(_loop_time(deadline)):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise MalformedRequest(Malformed.TOO_LARGE) from None
        except (web.RequestPayloadError, ClientPayloadError, HttpProcessingError):
            raise MalformedRequest(Malformed.NOT_HTTP) from None
    if request.method == "GET":
        if len(request.raw_path) + len("GET  HTTP/1.1") > wire.LONGEST_REQUEST_LINE_BYTES:
            raise MalformedRequest(Malformed.TOO_LARGE)
        return request.raw_path.partition("?")[2].encode("utf-8", "surrogateescape")
    raise MalformedRequest(Malformed.NOT_HTTP)
