"""The shipped dashboard asks for figures that a box gives, by labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from edge.health.exposition import families
from edge.health.metrics import Metrics
from tests.edge.test_metrics_server import figures

DASHBOARD = Path(__file__).resolve().parent.parent / "deploy" / "grafana" / "lineward.json"
NAME = re.compile(r"\b(?:lineward|process)_\w+")
LABEL = re.compile(r"\{\{(\w+)\}\}")
# Given by Prometheus itself to whatever it reads.
OF_PROMETHEUS = {"instance", "job"}


class Box(Collector):
    def collect(self) -> object:  # type: ignore[override]  # an iterable of families
        metrics = Metrics()
        metrics.observe({"inference": 1.0})
        return families(
            figures(metrics, outbox=dict.fromkeys(("depth", "bytes", "dropped", "acknowledged", "appended"), 1))
        )


def test_dashboard_asks_for_what_a_box_gives() -> None:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Box())
    ProcessCollector(registry=registry)
    given = {
        sample.name: set(sample.labels)
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    asked = [(target["expr"], target["legendFormat"]) for panel in panels for target in panel["targets"]]

    assert len(panels) > 10
    for expression, legend in asked:
        names = NAME.findall(expression)
        assert set(names) <= set(given), expression
        assert set(LABEL.findall(legend)) <= given[names[0]] | OF_PROMETHEUS, legend
