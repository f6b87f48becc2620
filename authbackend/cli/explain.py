"""``explain``: why a device may or may not do something."""

from __future__ import annotations

import click

from authbackend.api.explanations import ACTIONS, as_text
from authbackend.api.explanations import as_json as to_json
from authbackend.cli.common import json_option, run, settings_of, show
from authbackend.policy.decide import DecisionSettings
from authbackend.policy.explain import Attempt
from authbackend.policy.explain import explain as explain_attempt
from authbackend.postgres import partial_registry
from authbackend.service import replica

DENIED = 6


@click.command()
@click.argument("device")
@click.argument("action", type=click.Choice(sorted(ACTIONS)))
@click.argument("topic")
@click.option("--client-id", help="MQTT client id. Default: the first that the device's type allows.")
@click.option("--vhost", help="Virtual host. Default: the first of the device's type.")
@click.option("--address", help="The client's IP address. Default: one that the device's type allows.")
@json_option
@click.pass_context
def explain(
    context: click.Context,
    device: str,
    action: str,
    topic: str,
    client_id: str | None,
    vhost: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """
    Show whether a device may publish or subscribe, and why.

    The answer is the one that RabbitMQ would get, from the same code: verdict, reason, and the rule that decided, or the
    nearest rules and what is missing. Exit status 0 if allowed, 6 if denied.
    """
    settings = settings_of(context)
    registry, known = run(partial_registry.load_partial(replica.target(settings, "authbackend cli"), device, client_id))
    attempt = Attempt(ACTIONS[action], topic, client_id, vhost, address)
    explanation = explain_attempt(
        registry, known, attempt, registry.now, DecisionSettings(settings.broker.mqtt_exchange)
    )
    result = to_json(known, attempt, explanation)
    show(result, as_json, lambda: as_text(result))
    if not explanation.decision.allowed:
        raise click.exceptions.Exit(DENIED)
