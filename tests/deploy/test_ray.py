"""The KubeRay manifests: their schemas come with their operator, so here are checks of our own."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from service.cli.commands.label import label
from service.settings import ENV_PREFIX, Settings, load_settings
from tests.deploy.conftest import DEPLOY, ROOT, Run, passed
from tests.deploy.test_kubernetes import QUANTITY

RAY = DEPLOY / "ray"
JOB = yaml.safe_load((RAY / "rayjob.yaml").read_text())
SERVICE = yaml.safe_load((RAY / "rayservice.yaml").read_text())
CLUSTERS = {
    "job": JOB["spec"]["rayClusterSpec"],
    "service": SERVICE["spec"]["rayClusterConfig"],
}
Manifest = dict[str, Any]


@pytest.fixture(params=list(CLUSTERS))
def cluster(request: pytest.FixtureRequest) -> Manifest:
    return CLUSTERS[request.param]


def pods(cluster: Manifest) -> Iterator[Manifest]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_the_dockerfile_is_sound(run: Run) -> None:
    passed(run("hadolint", "deploy/ray/Dockerfile"))


def test_the_version_is_the_one_that_test_ray_runs(cluster: Manifest) -> None:
    lock = (RAY / "requirements.lock").read_text()
    (version,) = re.findall(r"^ray==(\S+)", lock, re.M)
    assert cluster["rayVersion"] == version
    assert f"rayproject/ray:{version}-" in (RAY / "Dockerfile").read_text()


def test_what_an_image_is_made_of_is_sent_to_the_builder() -> None:
    sent = (RAY / "Dockerfile.dockerignore").read_text().splitlines()
    for line in (RAY / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY") and "$" not in line:
            for source in line.split()[1:-1]:
                assert f"!{source}" in sent, source


def test_no_pod_has_more_rights_than_it_needs(cluster: Manifest) -> None:
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_quantities_are_quantities(cluster: Manifest) -> None:
    for pod in pods(cluster):
        (container,) = pod["containers"]
        assert container["resources"]["limits"].keys() >= {"memory"}
        for amounts in container["resources"].values():
            for amount in amounts.values():
                assert QUANTITY.fullmatch(str(amount)), amount


def test_workers_get_settings_that_exist(cluster: Manifest, monkeypatch: Any) -> None:
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        for item in container["env"]:
            assert item["name"].startswith(ENV_PREFIX)
            monkeypatch.setenv(item["name"], item["value"])
        settings = load_settings()
        assert settings.store_url is not None
        paths = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(settings.store) in paths  # where bundles are fetched into


def test_the_head_only_leads(cluster: Manifest) -> None:
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_job_runs_a_command_that_exists_and_takes_bad_videos_for_done() -> None:
    shell, flag, script = shlex.split(JOB["spec"]["entrypoint"])
    assert (shell, flag) == ("sh", "-c")
    command, ending = script.split(" || ")
    assert ending == "[ $? -eq 3 ]"
    program, name, *words = shlex.split(command)
    assert (program, name) == ("timesformer", "label")
    given = label.make_context("label", words).params
    assert (given["engine"], given["ray_address"]) == ("ray", "auto")
    (head,) = CLUSTERS["job"]["headGroupSpec"]["template"]["spec"]["containers"]
    paths = [mount["mountPath"] for mount in head["volumeMounts"]]
    assert str(given["out"].parent) in paths


def test_the_job_has_engines_on_gpus_and_decoders_without() -> None:
    by_name = {group["groupName"]: group for group in CLUSTERS["job"]["workerGroupSpecs"]}
    limits = {
        name: group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for name, group in by_name.items()
    }
    assert limits["engines"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits["decoders"]
    pod = by_name["engines"]["template"]["spec"]
    assert pod["containers"][0]["image"].endswith(":ray-gpu")
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


def test_the_service_serves_the_app_that_is_there() -> None:
    serving = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
    (application,) = serving["applications"]
    module, _, name = application["import_path"].partition(":")
    code = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    names = [
        target.id
        for item in code.body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name)
    ]
    assert name in names
    (deployment,) = application["deployments"]
    assert f'name="{deployment["name"]}"' in ast.unparse(code).replace("'", '"')
    assert deployment["max_ongoing_requests"] == Settings.model_fields["max_queue_clips"].default
    (head,) = CLUSTERS["service"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert [port["containerPort"] for port in head["ports"]] == [serving["http_options"]["port"]]
    (worker,) = CLUSTERS["service"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    cpus = deployment["ray_actor_options"]["num_cpus"]
    assert cpus <= int(container["resources"]["requests"]["cpu"])
