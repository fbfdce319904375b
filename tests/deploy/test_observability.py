"""Alerts, recording rules and the dashboard: sound, tested, and made of metrics that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.observability.metrics import Metrics
from tests.deploy.conftest import DEPLOY, ROOT, Run, passed

RULES = DEPLOY / "prometheus/rules.yml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDS = [rule for group in GROUPS for rule in group["rules"] if "record" in rule]
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
# Prometheus's own, and what its scrapes add.
BUILT_IN = {"ALERTS", "up"}
# Numbers of the process come from Linux's /proc.
NAME = re.compile(r"(?<![\w:\"$/])(?:[\w]+:)?(?:timesformer_|process_|ALERTS|up\b)[\w:]*")


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return list(json.loads(dashboard.read_text())["panels"])


def expressions(dashboard: Path) -> Iterator[str]:
    """PromQL of the panels, with Grafana's variables filled in."""
    for panel in panels(dashboard):
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m")


def names(expression: str) -> set[str]:
    return set(NAME.findall(expression))


def exported() -> set[str]:
    """Every series name that `/metrics` may have."""
    found = {"process_cpu_seconds_total"}
    for metric in Metrics().registry.collect():
        suffixes = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(metric.type, ("",))
        found |= {metric.name + suffix for suffix in suffixes}
    return found


def test_the_rules_are_sound(run: Run) -> None:
    passed(run("promtool", "check", "rules", RULES))


def test_prometheus_takes_its_configuration(run: Run) -> None:
    passed(run("promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml"))


def test_each_alert_fires_on_what_it_is_for_and_on_nothing_else(run: Run) -> None:
    passed(run("promtool", "test", "rules", *sorted((DEPLOY / "prometheus/tests").glob("*.yml"))))


def test_each_alert_is_tested_and_fires_in_its_test() -> None:
    cases = yaml.safe_load((DEPLOY / "prometheus/tests/alerts.yml").read_text())["tests"]
    fired = {
        test["alertname"]
        for case in cases
        for test in case.get("alert_rule_test", [])
        if test["exp_alerts"]
    }
    assert fired == {rule["alert"] for rule in ALERTS}


def test_each_alert_leads_to_its_section_of_the_runbook() -> None:
    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE))
    assert sections == {rule["alert"] for rule in ALERTS}
    for rule in ALERTS:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}


def test_settings_that_the_runbook_names_exist() -> None:
    from service.settings import ENV_PREFIX, Settings

    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"TIMESFORMER_[A-Z_]+", (ROOT / "docs/runbook.md").read_text())) <= known


@pytest.mark.parametrize("rule", ALERTS + RECORDS, ids=lambda rule: rule.get("alert", "record"))
def test_the_rules_metrics_exist(rule: dict[str, Any]) -> None:
    records = {other["record"] for other in RECORDS}
    assert names(rule["expr"])
    assert names(rule["expr"]) <= exported() | records | BUILT_IN


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboards_metrics_exist(dashboard: Path) -> None:
    records = {rule["record"] for rule in RECORDS}
    for expression in expressions(dashboard):
        assert names(expression), expression
        assert names(expression) <= exported() | records | BUILT_IN, expression


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboards_queries_are_promql(dashboard: Path, run: Run, tmp_path: Path) -> None:
    rules = [{"record": "a", "expr": expression} for expression in expressions(dashboard)]
    # The same expression twice would be a duplicate rule.
    unique = [{**rule, "record": f"query:{number}"} for number, rule in enumerate(rules)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": unique}]}))
    passed(run("promtool", "check", "rules", file))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_the_dashboards_panels_do_not_overlap(dashboard: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        place = panel["gridPos"]
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    identifiers = [panel["id"] for panel in panels(dashboard)]
    assert len(set(identifiers)) == len(identifiers)


def test_a_metric_that_is_not_there_would_be_found() -> None:
    expression = 'sum(rate(timesformer_wishes_total{job="$job"}[5m])) / job:timesformer_x:rate5m'
    assert names(expression) == {"timesformer_wishes_total", "job:timesformer_x:rate5m"}
    assert not names(expression) & exported()


def test_the_dashboards_data_source_is_the_one_that_is_provisioned() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus"
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            if panel["type"] != "row":
                assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}
