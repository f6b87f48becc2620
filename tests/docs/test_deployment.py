"""What is deployed fits together: ports, alerts and the metrics that they look at."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from authbackend.cli.reference import pages
from authbackend.settings import Health

REPO = Path(__file__).parent.parent.parent
DEPLOY = REPO / "deploy"
ALERTS = DEPLOY / "alerts.yml"


def test_everybody_asks_for_health_and_metrics_where_they_are():
    port = Health().listen.rpartition(":")[2]
    compose = yaml.safe_load((REPO / "docker-compose.yml").read_text())
    assert compose["x-authbackend"]["environment"]["AUTHBACKEND_HEALTH__LISTEN"] == f"0.0.0.0:{port}"
    assert f"AUTHBACKEND_HEALTH__LISTEN=0.0.0.0:{port}" in (REPO / "Dockerfile").read_text()
    assert re.findall(r"check port (\d+)", (DEPLOY / "haproxy.cfg").read_text()) == [port]
    (job,) = [
        job
        for job in yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
        if job["job_name"] == "authbackend"
    ]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [
        f"{name}:{port}" for name in compose["services"] if re.fullmatch(r"authbackend\d", name)
    ]


def test_alerts_look_at_metrics_that_are_there():
    known = set(re.findall(r"^\| `(authbackend_\w+)`", pages()["metrics.md"], re.MULTILINE))
    used = set()
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            used |= set(re.findall(r"\bauthbackend_\w+", rule["expr"]))
    assert used
    assert {re.sub("_(bucket|sum|count)$", "", name) for name in used} <= known


@pytest.fixture
def promtool():
    """Run promtool."""
    path = shutil.which("promtool")
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed (Debian package prometheus)")

    def run(*arguments):
        done = subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_promtool_finds_configuration_and_alerts_clean(promtool):
    promtool("check", "config", DEPLOY / "prometheus.yml")
    promtool("check", "rules", ALERTS)


REFUSING = {
    "AuthbackendRefusesRabbitMQ": "authbackend_connections_closed_total",
    "AuthbackendRefusesHealthChecks": "authbackend_health_connections_closed_total",
    "AuthbackendRefusesPeople": "authbackend_admin_connections_closed_total",
}


@pytest.mark.parametrize(
    ("cause", "values", "minute", "fires"),
    [
        ("too_many", "0+0x5 3+0x30", 7, True),
        ("too_many", "_x6 1+0x30", 7, True),  # the first of its kind
        ("too_many", "3+0x40", 20, False),
        ("slow", "0+1x40", 20, False),
    ],
)
@pytest.mark.parametrize("alert", REFUSING)
def test_a_listener_that_refuses_connections_is_alarmed(promtool, tmp_path, alert, cause, values, minute, fires):
    series = {f'{REFUSING[alert]}{{instance="one", cause="{cause}"}}': values}
    assert_alert(promtool, tmp_path, alert, series, minute, fires)


@pytest.mark.parametrize(
    ("each_minute", "fires"),
    [({"": 4}, True), ({"": 0, "health_": 2, "admin_": 2}, True), ({"": 1, "health_": 1}, False), ({}, False)],
)
def test_many_slow_clients_are_alarmed_whatever_the_listener(promtool, tmp_path, each_minute, fires):
    series = {
        f'authbackend_{listener}connections_closed_total{{instance="one", cause="slow"}}': f"0+{number}x40"
        for listener, number in each_minute.items()
    }
    series['authbackend_connections_closed_total{instance="one", cause="too_many"}'] = "0+9x40"
    assert_alert(promtool, tmp_path, "AuthbackendSlowClients", series, 20, fires)


def assert_alert(promtool, folder, alert, series, minute, fires):
    """Let promtool play the series and look whether the alert fires."""
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing", instance="one"}}) or vector(0)',
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": "{}", "value": int(fires)}],
                    }
                ],
            }
        ],
    }
    file = folder / "test.yml"
    file.write_text(json.dumps(test))
    promtool("test", "rules", file)
