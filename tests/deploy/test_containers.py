"""The Dockerfile and docker-compose.yml: sound, hardened, and in step with the service."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

from service.settings import ENV_PREFIX, Settings
from tests.deploy.conftest import ROOT, Run, passed

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S))
FINAL = ["serve-cpu", "serve-gpu", "train"]


def test_the_dockerfile_is_sound(run: Run) -> None:
    passed(run("hadolint", "Dockerfile"))


def test_compose_takes_its_file(run: Run) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    passed(run("check-jsonschema", *schema, "docker-compose.yml"))


@pytest.mark.parametrize("stage", FINAL)
def test_an_image_runs_as_a_number_and_says_what_it_is(stage: str) -> None:
    text = STAGES[stage]
    assert re.search(r"^USER 10001:10001$", text, re.M)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'org.opencontainers.image.version="{version}"' in text
    for label in ("title", "description", "licenses", "revision"):
        assert f"org.opencontainers.image.{label}=" in text
    assert "HEALTHCHECK" in text


@pytest.mark.parametrize(("stage", "lock"), [
    ("install-cpu", "requirements.lock"),
    ("install-gpu", "requirements-gpu.lock"),
    ("install-train", "requirements-train.lock"),
])  # fmt: skip
def test_dependencies_are_installed_by_hash_before_our_code(stage: str, lock: str) -> None:
    text = STAGES[stage]
    assert text.index("--require-hashes") < text.index("COPY --from=wheel")
    assert f"COPY {lock}" in text
    requirements = re.findall(
        r"^[a-zA-Z][\w.\[\]-]*==\S+[^\n]*\\\n\s+--hash", (ROOT / lock).read_text(), re.M
    )
    assert len(requirements) == len(re.findall(r"^[a-zA-Z]", (ROOT / lock).read_text(), re.M)) > 20


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-gpu.lock"])
def test_what_serves_has_no_torch(lock: str) -> None:
    assert not re.search(r"^torch==", (ROOT / lock).read_text(), re.M)


def test_what_the_images_are_made_of_reaches_the_builder() -> None:
    sent = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
        for word in line.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / path).exists() for path in sent)


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_few_rights_and_an_end(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service
    assert not {"privileged", "cap_add", "network_mode", "pid"} & service.keys()
    if "build" in service:
        assert service["build"]["target"] in FINAL
    else:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert "healthcheck" in service


def test_a_tmpfs_is_writable_for_its_user_under_docker_and_podman() -> None:
    # Podman does not know uid= and gid=; runc may keep the mode of the image's folder instead.
    mounts = [mount for service in SERVICES.values() for mount in service.get("tmpfs", [])]
    for folder, options in (mount.split(":") for mount in mounts):
        assert re.fullmatch(r"size=\d+[mg](,mode=1777)?", options), options
        assert folder == "/tmp" or options.endswith(",mode=1777"), folder  # noqa: S108
    for stage in ("serve-cpu", "serve-gpu"):
        assert "install -d -m 1777 /spool" in STAGES[stage]


def test_only_the_service_listens_beyond_this_machine() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:") or name.startswith("timesformer"), port
    assert SERVICES["timesformer"]["ports"][0].endswith(f":{Settings.model_fields['port'].default}")


def test_profiles_start_what_they_should() -> None:
    default = dict(
        line.split("=", 1) for line in (ROOT / ".env").read_text().splitlines() if line[:1] != "#"
    )["COMPOSE_PROFILES"]

    def started(profile: str) -> set[str]:
        return {
            name
            for name, service in SERVICES.items()
            if "profiles" not in service or profile in service["profiles"]
        }

    assert started(default) == {"timesformer", "prometheus", "grafana"}
    assert started("gpu") == {"timesformer-gpu", "prometheus", "grafana"}
    assert "refresh" in started("refresh")


def test_what_compose_sets_are_settings() -> None:
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    for service in SERVICES.values():
        ours = {name for name in service.get("environment", {}) if name.startswith(ENV_PREFIX)}
        assert ours <= known


def test_stopping_leaves_time_to_answer() -> None:
    grace = Settings.model_fields["shutdown_grace_s"].default
    for name in ("timesformer", "timesformer-gpu"):
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > grace


def test_prometheus_scrapes_the_services_that_there_are() -> None:
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    jobs = yaml.safe_load(text)["scrape_configs"]
    found = {
        name for job in jobs for source in job.get("dns_sd_configs", []) for name in source["names"]
    }
    assert found == {"timesformer", "timesformer-gpu"} <= SERVICES.keys()


def test_files_that_are_mounted_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume
