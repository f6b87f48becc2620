"""The four endpoints of RabbitMQ's HTTP auth backend, decided from the copy of the registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from authbackend.broker import protocol
from authbackend.broker.metrics import BrokerMetrics
from authbackend.broker.protocol import Malformed, MalformedRequest
from authbackend.broker.responses import Prepared, Responses
from authbackend.logs import Sampler
from authbackend.passwords import Busy, PasswordChecker
from authbackend.policy import decide
from authbackend.policy.decide import Decision, PasswordCheck
from authbackend.policy.reasons import Reason
from authbackend.policy.requests import LoginRequest
from authbackend.registry.store import Reader

log = structlog.get_logger(__name__)

_LONGEST_LOGGED = 256
_HTTP_1_1 = (1, 1)
_STALE = Decision(False, Reason.REGISTRY_STALE)
_MALFORMED = Decision(False, Reason.MALFORMED_REQUEST)


@dataclass(frozen=True, slots=True)
class Question:
    """
    One endpoint: how its requests are parsed and decided.

    Args:
        patience: The share of the time limit that a request may wait in the queue before it is shed. Logins are shed
            first: a refused publish or subscription closes a connection, which causes another login and all that follows.
    """

    name: str
    patience: float
    parse: Callable[[dict[str, str]], Any]
    decide: Callable[[Reader, Any, float, decide.DecisionSettings], Decision | PasswordCheck]


QUESTIONS = {
    f"/auth/{question.name}": question
    for question in (
        Question("user", 0.25, protocol.login_request, lambda copy, request, now, _: decide.login(copy, request, now)),
        Question("vhost", 0.5, protocol.vhost_request, lambda copy, request, now, _: decide.vhost(copy, request, now)),
        Question("resource", 1.0, protocol.resource_request, decide.resource),
        Question("topic", 1.0, protocol.topic_request, decide.topic),
    )
}


@dataclass(frozen=True, slots=True)
class Limits:
    """
    Time limits.

    Args:
        request_s: Longest time from the arrival of a request to its answer.
        staleness_s: Maximum age of the copy of the registry to decide by.
    """

    request_s: float = 1.0
    staleness_s: float = 900.0


@dataclass(frozen=True, slots=True, repr=False)
class PendingLogin:
    """A login that waits for its password check, which is slow."""

    question: Question
    request: LoginRequest
    check: PasswordCheck


class Handlers:
    """
    Answers RabbitMQ: 200 with ``allow``, ``allow TAGS`` or ``deny``; 503 if authbackend itself fails.

    Args:
        deny_reasons: Answer ``deny REASON``; for RabbitMQ 4.3 and later.
    """

    def __init__(
        self,
        registry: Reader,
        passwords: PasswordChecker,
        metrics: BrokerMetrics,
        sampler: Sampler,
        settings: decide.DecisionSettings,
        limits: Limits,
        *,
        deny_reasons: bool = False,
    ) -> None:
        self._registry = registry
        self._passwords = passwords
        self.metrics = metrics
        self._sampler = sampler
        self._settings = settings
        self._limits = limits
        self._deny_reasons = deny_reasons
        self._responses = Responses()

    def answer(self, question: Question, form: bytes, arrived: float) -> Prepared | PendingLogin:
        """
        Answer a request whose form is complete; never raises.

        Args:
            arrived: When its last bytes arrived, by the monotonic clock.
        Returns:
            The response, or a login that waits for a password check.
        """
        try:
            if self._waited_too_long(question, arrived):
                return self._responses.unavailable
            request = question.parse(protocol.parse_form(form))
            outcome = self._decide(question, request)
            if isinstance(outcome, PasswordCheck):
                return PendingLogin(question, request, outcome)
            return self._response(question, request, outcome)
        except MalformedRequest as fault:
            self._count_malformed(question.name, fault.cause)
            return self._responses.ok(protocol.answer(_MALFORMED, with_reason=self._deny_reasons))
        except Exception as error:
            self._crashed(question, error)
            return self._responses.unavailable

    async def handle(
        self, question: Question, request: web.BaseRequest, arrived: float, pending: PendingLogin | None = None
    ) -> web.StreamResponse:
        """
        Answer a request that :meth:`answer` alone could not; raises nothing except on cancellation.

        Args:
            arrived: When the latest of its bytes arrived, by the monotonic clock.
            pending: The login that :meth:`answer` returned, if it was called for this request.
        """
        deadline = arrived + self._limits.request_s
        try:
            answer = pending or await self._read_and_answer(question, request, arrived, deadline)
            if isinstance(answer, PendingLogin):
                answer = await self._check_password(answer, deadline)
            return answer if isinstance(answer, web.Response) else answer.suited_to(request)
        except MalformedRequest as fault:
            return self.malformed(question.name, fault.cause)
        except TimeoutError:
            return self._unavailable(question.name, "timeout")
        except ConnectionError:
            return self._unavailable(question.name, "connection_lost")
        except Exception as error:
            self._crashed(question, error)
            return self._responses.unavailable.suited_to(request)
        finally:
            self.metrics.answered(question.name, time.monotonic() - arrived)

    def malformed(self, endpoint: str, cause: Malformed) -> web.Response:
        """Deny a request that RabbitMQ would not send, and count it by cause."""
        self._count_malformed(endpoint, cause)
        return web.Response(text=protocol.answer(_MALFORMED, with_reason=self._deny_reasons))

    async def _read_and_answer(
        self, question: Question, request: web.BaseRequest, arrived: float, deadline: float
    ) -> Prepared | PendingLogin | web.Response:
        if request.method == "POST" and request.content.is_eof():
            return self.answer(question, _complete_form(request), arrived)
        if self._waited_too_long(question, arrived):
            return self._unavailable(question.name, "timeout")
        with self.metrics.in_flight.track_inprogress():
            form = await _read_form(request, deadline)
        return self.answer(question, form, time.monotonic())  # reading the form does not count as waiting

    async def _check_password(self, login: PendingLogin, deadline: float) -> Prepared:
        with self.metrics.in_flight.track_inprogress():
            async with asyncio.timeout_at(_loop_time(deadline)):
                decision = await self._decide_by_password(login.check, login.request.password or "")
        return self._response(login.question, login.request, decision)

    def _decide(self, question: Question, request: Any) -> Decision | PasswordCheck | None:
        """Decide at one version of the registry; return None if it has not been loaded."""
        with self._registry as registry:
            if registry.state is None:
                self.metrics.failures.labels(question.name, "not_ready").inc()
                return None
            if registry.stale(self._limits.staleness_s):
                return _STALE
            return question.decide(registry, request, registry.now, self._settings)

    def _response(self, question: Question, request: Any, decision: Decision | None) -> Prepared:
        """Count and log a decision, and return its response."""
        if decision is None:
            return self._responses.unavailable
        self.metrics.decided(question.name, decision)
        if not decision.allowed:
            self._log_denial(question.name, request, decision)
        return self._responses.ok(protocol.answer(decision, with_reason=self._deny_reasons))

    async def _decide_by_password(self, check: PasswordCheck, password: str) -> Decision:
        try:
            is_correct = await self._passwords.check(check.account, password)
        except Busy:
            return Decision(False, Reason.PASSWORD_CHECKS_BUSY, check.otherwise.kind)
        if not is_correct or check.account is None:
            return check.otherwise
        with self._registry as registry:
            if registry.account(check.account.name) != check.account:
                return check.otherwise  # the account changed while its password was being checked
        return check.then

    def _waited_too_long(self, question: Question, arrived: float) -> bool:
        if time.monotonic() - arrived <= question.patience * self._limits.request_s:
            return False
        self.metrics.shed.labels(question.name).inc()
        return True

    def _unavailable(self, endpoint: str, cause: str) -> web.Response:
        """Return 503 and close the connection, on which the rest of the body may still arrive."""
        self.metrics.failures.labels(endpoint, cause).inc()
        response = web.Response(status=503, text="unavailable")
        response.force_close()
        return response

    def _crashed(self, question: Question, error: Exception) -> None:
        log.error("broker.request_crashed", endpoint=question.name, error=type(error).__name__, exc_info=error)
        self.metrics.failures.labels(question.name, "crash").inc()

    def _count_malformed(self, endpoint: str, cause: Malformed) -> None:
        self.metrics.malformed.labels(endpoint, cause).inc()
        self.metrics.decided(endpoint, _MALFORMED)
        admitted, suppressed = self._sampler.admit(f"\x00{cause}")
        if admitted:
            log.info("malformed", endpoint=endpoint, cause=str(cause), unlogged=suppressed)

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


def _complete_form(request: web.BaseRequest) -> bytes:
    """Return the form of a request that has arrived completely."""
    form = request.content.read_nowait()
    if len(form) > protocol.LONGEST_BODY_BYTES:
        raise MalformedRequest(Malformed.TOO_LARGE)
    return form


def _send_continue(request: web.BaseRequest) -> None:
    """Send 100 Continue if the client waits for it (RFC 9110 section 10.1.1), unless the body is too large anyway."""
    if request.version < _HTTP_1_1 or request.headers.get("Expect", "").lower() != "100-continue":
        return
    if (request.content_length or 0) > protocol.LONGEST_BODY_BYTES:
        raise MalformedRequest(Malformed.TOO_LARGE)
    if request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _read_form(request: web.BaseRequest, deadline: float) -> bytes:
    """Read the form with the parameters: the body of a POST, the query of a GET."""
    if request.method == "POST":
        _send_continue(request)
        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise MalformedRequest(Malformed.TOO_LARGE) from None
        except (web.RequestPayloadError, ClientPayloadError, HttpProcessingError):
            raise MalformedRequest(Malformed.NOT_HTTP) from None
    if request.method == "GET":
        if len(request.raw_path) + len("GET  HTTP/1.1") > protocol.LONGEST_REQUEST_LINE_BYTES:
            raise MalformedRequest(Malformed.TOO_LARGE)
        return request.raw_path.partition("?")[2].encode("utf-8", "surrogateescape")
    raise MalformedRequest(Malformed.NOT_HTTP)
