"""The manifests, as Kustomize makes them: valid, hardened, and leading to what is really there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.server.app import create_app
from service.settings import ENV_PREFIX, Settings, load_settings
from tests.deploy.conftest import DEPLOY, Run, passed
from tests.deploy.test_observability import exported, names

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = [
    "overlays/cpu",
    "overlays/gpu",
    "overlays/scale",
    "overlays/scale-keda",
    "overlays/objectstore",
    "refresh",
]
# Their schemas come with their operators; here they are held by tests of our own.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
QUANTITY = re.compile(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?")
Manifest = dict[str, Any]
_built: dict[str, list[Manifest]] = {}


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest, run: Run) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    return build(request.param, run)


def build(overlay: str, run: Run) -> list[Manifest]:
    if overlay not in _built:
        done = run("kubectl", "kustomize", KUBERNETES / overlay)
        passed(done)
        _built[overlay] = list(yaml.safe_load_all(done.stdout))
    return _built[overlay]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] == kind]


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = of_kind(manifests, kind)
    return found


def workloads(manifests: list[Manifest]) -> list[Manifest]:
    return of_kind(manifests, "Deployment") + of_kind(manifests, "Job")


def pod_labels(manifests: list[Manifest]) -> list[dict[str, str]]:
    return [item["spec"]["template"]["metadata"]["labels"] for item in workloads(manifests)]


def containers(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Each container of each workload, with its pod's spec."""
    for workload in workloads(manifests):
        pod = workload["spec"]["template"]["spec"]
        for container in pod.get("initContainers", []) + pod["containers"]:
            yield pod, container


def matches(selector: Manifest, labels: dict[str, str]) -> bool:
    return selector["matchLabels"].items() <= labels.items()


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    """What the config map sets; empty for a job, which has its own."""
    return {
        key: value
        for item in of_kind(manifests, "ConfigMap")
        for key, value in item["data"].items()
    }


def test_every_overlay_is_valid_kubernetes(
    manifests: list[Manifest], run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(item for item in manifests if item["kind"] not in CUSTOM))
    output = passed(run("kubernetes-validate", "--strict", file))
    assert "WARN" not in output, output  # an unknown kind or version is only that


def test_a_field_that_kubernetes_does_not_know_would_be_found(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "manifest.yaml"
    service = only(build("overlays/cpu", run), "Service")
    file.write_text(yaml.safe_dump({**service, "spec": {**service["spec"], "selectors": {}}}))
    assert run("kubernetes-validate", "--strict", file).returncode != 0


def test_everything_is_in_one_namespace(manifests: list[Manifest]) -> None:
    for item in manifests:
        if item["kind"] != "Namespace":
            assert item["metadata"]["namespace"] == "timesformer", item["metadata"]["name"]


def test_no_pod_has_more_rights_than_the_restricted_profile(manifests: list[Manifest]) -> None:
    for pod, container in containers(manifests):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_is_mounted_is_there(manifests: list[Manifest]) -> None:
    for pod, container in containers(manifests):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for source in container.get("envFrom", []):
            known = {item["metadata"]["name"] for item in of_kind(manifests, "ConfigMap")}
            assert source["configMapRef"]["name"] in known


def bytes_of(amount: str) -> int:
    return int(amount[:-2]) * {"Mi": 2**20, "Gi": 2**30}[amount[-2:]]


def test_quantities_are_quantities_and_requests_fit_into_limits(manifests: list[Manifest]) -> None:
    for pod, container in containers(manifests):
        resources = container["resources"]
        assert "memory" in resources["limits"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        assert bytes_of(resources["requests"]["memory"]) <= bytes_of(resources["limits"]["memory"])
        for amounts in resources.values():
            for amount in amounts.values():
                assert QUANTITY.fullmatch(str(amount)), amount
        for volume in pod["volumes"]:
            if limit := volume.get("emptyDir", {}).get("sizeLimit"):
                assert QUANTITY.fullmatch(limit), limit
    for claim in of_kind(manifests, "PersistentVolumeClaim"):
        assert QUANTITY.fullmatch(claim["spec"]["resources"]["requests"]["storage"])


def test_every_selector_finds_our_pods(manifests: list[Manifest]) -> None:
    selectors = [
        {"matchLabels": item["spec"]["selector"]} for item in of_kind(manifests, "Service")
    ]
    selectors += [item["spec"]["podSelector"] for item in of_kind(manifests, "NetworkPolicy")]
    for item in of_kind(manifests, "PodDisruptionBudget") + of_kind(manifests, "Deployment"):
        selectors.append(item["spec"]["selector"])
    for item in of_kind(manifests, "Deployment"):
        constraints = item["spec"]["template"]["spec"]["topologySpreadConstraints"]
        selectors += [constraint["labelSelector"] for constraint in constraints]
    for selector in selectors:
        assert any(matches(selector, labels) for labels in pod_labels(manifests)), selector


def test_probes_and_ports_lead_to_what_the_service_answers(manifests: list[Manifest]) -> None:
    paths = create_app(load_settings()).openapi()["paths"]
    for deployment in of_kind(manifests, "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"http": Settings.model_fields["port"].default}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports
            assert container[probe]["httpGet"]["path"] in paths
        assert "live" in container["livenessProbe"]["httpGet"]["path"]
        (service_port,) = only(manifests, "Service")["spec"]["ports"]
        assert service_port["targetPort"] in ports
        (rule,) = only(manifests, "NetworkPolicy")["spec"]["ingress"]
        assert [port["port"] for port in rule["ports"]] == list(ports)


def test_a_rollout_loses_no_request(manifests: list[Manifest]) -> None:
    for deployment in of_kind(manifests, "Deployment"):
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        settings = settings_of(manifests)
        delay = float(settings["TIMESFORMER_SHUTDOWN_DELAY_S"])
        grace = float(settings["TIMESFORMER_SHUTDOWN_GRACE_S"])
        assert pod["terminationGracePeriodSeconds"] >= delay + grace + 5
        readiness = container["readinessProbe"]
        assert delay > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_what_is_set_are_settings(manifests: list[Manifest], monkeypatch: Any) -> None:
    values = settings_of(manifests) | {
        item["name"]: item["value"]
        for _, each in containers(manifests)
        for item in each.get("env", [])
    }
    for name, value in values.items():
        assert name.startswith(ENV_PREFIX)
        monkeypatch.setenv(name, value)
    load_settings()
    # Or Kubernetes sets TIMESFORMER_PORT for the Service of that name.
    assert all(pod["enableServiceLinks"] is False for pod, _ in containers(manifests))


def test_bundles_from_an_object_store_need_no_volume_but_a_way_out(run: Run) -> None:
    manifests = build("overlays/objectstore", run)
    assert of_kind(manifests, "PersistentVolumeClaim") == []
    values = settings_of(manifests)
    assert values["TIMESFORMER_STORE_URL"].startswith("s3://")
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[values["TIMESFORMER_STORE"]]["readOnly"] is False
    (bundles,) = [volume for volume in pod["volumes"] if volume["name"] == "bundles"]
    assert bundles.keys() == {"name", "emptyDir"}
    (rule,) = only(manifests, "NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for port in rule["ports"]} == {53, 443}


@pytest.mark.parametrize("overlay", ["overlays/cpu", "overlays/gpu"])
def test_prometheus_finds_the_service(overlay: str, run: Run) -> None:
    manifests = build(overlay, run)
    monitor, service = only(manifests, "ServiceMonitor"), only(manifests, "Service")
    assert matches(monitor["spec"]["selector"], service["metadata"]["labels"])
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    assert endpoint["path"] in create_app(load_settings()).openapi()["paths"]
    # The operator names the job after the Service; rules and dashboard know it by that name.
    assert service["metadata"]["name"] == "timesformer"


def test_the_prometheus_rule_is_the_one_that_the_script_makes() -> None:
    rule = yaml.safe_load((KUBERNETES / "monitoring/prometheusrule.yaml").read_text())
    rules = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())
    assert rule["spec"] == rules, "run `make docs`"


def test_the_gpu_overlay_asks_for_a_gpu_and_builds_its_engine(run: Run) -> None:
    manifests = build("overlays/gpu", run)
    pod = only(manifests, "Deployment")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    (engines,) = pod["initContainers"]
    for container in (engines, *pod["containers"]):
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert container["image"].endswith(":gpu")
    assert engines["args"] == ["engines", "build"]
    assert {"name": "bundles", "mountPath": "/bundles"} in engines["volumeMounts"]
    assert settings_of(manifests)["TIMESFORMER_STORE"] == "/bundles"
    assert settings_of(manifests)["TIMESFORMER_DEVICE"] == "cuda"
    labels = only(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels["accelerator"] == "nvidia"  # the alerts look at it
    assert only(manifests, "ServiceMonitor")["spec"]["podTargetLabels"] == ["accelerator"]


def test_the_autoscalers_scale_our_deployment_by_a_metric_that_exists(run: Run) -> None:
    for overlay, kind in (("scale", "HorizontalPodAutoscaler"), ("scale-keda", "ScaledObject")):
        manifests = build(f"overlays/{overlay}", run)
        deployment = only(manifests, "Deployment")
        assert "replicas" not in deployment["spec"]
        scaler = only(manifests, kind)["spec"]
        assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        if kind == "ScaledObject":
            (trigger,) = scaler["triggers"]
            assert names(trigger["metadata"]["query"]) <= exported()
        else:
            (metric,) = scaler["metrics"]
            asked = metric["pods"]["metric"]["name"]
            adapter = yaml.safe_load((KUBERNETES / "overlays/scale/adapter.yaml").read_text())
            (rule,) = adapter["rules"]["custom"]
            assert asked == rule["name"]["as"] in exported()
            assert rule["seriesQuery"].startswith(rule["name"]["matches"])
