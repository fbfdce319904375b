"""The PrometheusRule of the alerts that Prometheus reads from a file elsewhere (`make docs`).

python deploy/kubernetes/monitoring/generate.py > deploy/kubernetes/monitoring/prometheusrule.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

RULES = Path(__file__).parents[2] / "prometheus/rules.yml"
HEAD = """\
# Made from deploy/prometheus/rules.yml by `make docs`; do not edit.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: timesformer
spec:
"""


def prometheus_rule() -> str:
    """The manifest, with the rules as they stand in their file."""
    lines = RULES.read_text().splitlines()
    groups = lines[lines.index("groups:") :]
    return HEAD + "\n".join(f"  {line}".rstrip() for line in groups) + "\n"


if __name__ == "__main__":
    sys.stdout.write(prometheus_rule())
