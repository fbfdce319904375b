"""Settings: each from its variable or its flag, and every mistake named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from service.cli.main import cli
from service.settings import (
    ENV_PREFIX,
    REMOVED,
    Settings,
    SettingsError,
    load_settings,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Settings that `timesformer serve` was started with; it does not really start."""
    settings: list[Settings] = []
    monkeypatch.setattr("service.server.serve.serve", settings.append)
    return settings


# Of what not every address or number is an example of.
EXAMPLES = {
    "gpu": "0,1",
    "max_spool_bytes": 1 << 32,
    "source_hosts": "videos.example.org",
    "webhook_hosts": "*.example.org",
}
# What a setting cannot be without.
COMPANIONS = {"store_url": {"store": "/somewhere"}}


def another_value(name: str) -> Any:
    """A value that the field may have and does not have by default."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    field = Settings.model_fields[name]
    default = field.get_default(call_default_factory=True)
    types = get_args(field.annotation) or (field.annotation,)
    choices = [value for value in types if isinstance(value, str)]
    if choices:
        return next(value for value in choices if value != default)
    if bool in types:
        return not default
    if int in types:
        largest = [bound.le for bound in field.metadata if hasattr(bound, "le")]
        return default + 1 if default is not None else min([1 << 30, *largest])
    if float in types:
        return default + 0.5
    return Path("/somewhere/else") if Path in types else "https://example.com"


def variable(name: str) -> str:
    return f"{ENV_PREFIX}{name.upper()}"


def test_every_setting_has_a_variable_that_changes_nothing_else() -> None:
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in Settings.model_fields.items()
    }
    for name in Settings.model_fields:
        given = {name: another_value(name), **COMPANIONS.get(name, {})}
        with pytest.MonkeyPatch.context() as patch:
            for each, value in given.items():
                patch.setenv(variable(each), str(value))
            settings = load_settings()
        changed = {each for each in defaults if getattr(settings, each) != defaults[each]}
        assert changed == given.keys()
        assert getattr(settings, name) == given[name]


def test_every_setting_has_a_flag_that_beats_its_variable(served: list[Settings]) -> None:
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = another_value(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable(name), str(default or "x"))
            for companion, needed in COMPANIONS.get(name, {}).items():
                patch.setenv(variable(companion), needed)
            result = CliRunner().invoke(cli, ["serve", f"--{name.replace('_', '-')}", str(value)])
        assert result.exit_code == 0, result.output
        assert getattr(served.pop(), name) == value


def test_every_setting_says_what_it_is_for() -> None:
    text = " ".join(CliRunner().invoke(cli, ["serve", "--help"], terminal_width=200).output.split())
    for name, field in Settings.model_fields.items():
        description = field.description or ""
        assert description.endswith("."), name
        assert f"--{name.replace('_', '-')}" in text
        assert f"{' '.join(description.split())} [env: {variable(name)}]" in text


def test_variables_may_be_written_in_lower_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("timesformer_port", "1234")
    assert load_settings().port == 1234


@pytest.mark.parametrize("name", ["port", "store", "device"])
def test_an_empty_variable_counts_as_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files pass `${PORT:-}`; an empty store is not the folder where one stands."""
    monkeypatch.setenv(variable(name), "")
    assert getattr(load_settings(), name) == Settings.model_fields[name].default


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIMESFORMER_PORT", "web"),
        ("TIMESFORMER_PORT", "70000"),
        ("TIMESFORMER_DEVICE", "tpu"),
        ("TIMESFORMER_GPU", "first"),
        ("TIMESFORMER_GPU", "-1"),
        ("TIMESFORMER_GPU", "0,,1"),
        ("TIMESFORMER_GPU", "0,all"),
        ("TIMESFORMER_GPU", "1,01"),
        ("TIMESFORMER_MAX_BATCH_CLIPS", "0"),
        ("TIMESFORMER_DECODE_TIMEOUT_S", "nan"),
        ("TIMESFORMER_DECODE_TIMEOUT_S", "-1"),
        ("TIMESFORMER_DECODE_TIMEOUT_S", "inf"),
        ("TIMESFORMER_DECODE_MEMORY_BYTES", "1"),
        ("TIMESFORMER_LOG_LEVEL", "loud"),
    ],
)
def test_a_bad_value_is_refused_with_its_variable_and_itself(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name}: ")
    assert f"(got {value!r})" in str(caught.value)


def test_all_mistakes_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PORT": "web", "DEVICE": "tpu", "PROT": "1"}.items():
        monkeypatch.setenv(f"TIMESFORMER_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    named = {line.partition(":")[0] for line in str(caught.value).splitlines()}
    assert named == {"TIMESFORMER_PORT", "TIMESFORMER_DEVICE", "TIMESFORMER_PROT"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_queue_clips": 10}, "MAX_QUEUE_CLIPS: 10 is below TIMESFORMER_MAX_CLIPS_PER_REQUEST"),
        ({"port": 80, "admin_port": 80}, "ADMIN_PORT: it is 80 as TIMESFORMER_PORT is"),
        ({"store_url": "s3://a"}, "STORE_URL: it needs TIMESFORMER_STORE, the folder"),
        (
            {"max_spool_bytes": 9, "max_long_upload_bytes": 1},
            "MAX_SPOOL_BYTES: 9 is below TIMESFOR",
        ),
        (
            {"max_spool_bytes": 9, "max_upload_bytes": 9},
            "MAX_SPOOL_BYTES: 9 is below TIMESFORMER_MAX_LONG_UPLOAD_BYTES (2147483648)",
        ),
        (
            {"max_jobs_bytes": 1, "jobs_dir": "/somewhere"},
            "MAX_JOBS_BYTES: 1 is below TIMESFORMER_MAX_LONG_UPLOAD_BYTES (2147483648)",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named_and_nothing_else_is_told(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMESFORMER_STORE_URL", "s3://key:s3cret@bucket/bundles")
    given = {"store": "/somewhere", **given} if "store_url" not in given else given
    with pytest.raises(SettingsError) as refused:
        load_settings(**given)
    assert str(refused.value).startswith(f"TIMESFORMER_{message}")
    assert "s3cret" not in str(refused.value)
    assert "Value error" not in str(refused.value)


def test_a_quota_of_jobs_matters_only_where_there_are_jobs() -> None:
    assert load_settings(max_jobs_bytes=1).max_jobs_bytes == 1


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("TIMESFORMER_PROT", r"did you mean TIMESFORMER_PORT\?"),
        ("TIMESFORMER_MAX_BATCH_CLIP", r"did you mean TIMESFORMER_MAX_BATCH_CLIPS\?"),
        ("timesformer_modle", r"did you mean TIMESFORMER_MODEL\?"),
        ("TIMESFORMER_HTTP_PORT", "TIMESFORMER_PORT"),
        ("TIMESFORMER_QQQQQQQQQQQQQQQQQQ", "known are TIMESFORMER_HOST, TIMESFORMER_PORT"),
    ],
)
def test_a_variable_that_sets_nothing_is_refused_with_the_nearest_name(
    typo: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(typo, "1")
    with pytest.raises(SettingsError, match=rf"{typo}: there is no such setting; .*{hint}"):
        load_settings()


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_setting_is_refused_with_what_to_do_instead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = f"--{name.replace('_', '-')}"
    refused = CliRunner().invoke(cli, ["serve", flag, "1"], terminal_width=1000)
    assert refused.exit_code == 2
    assert f"{flag}: this setting was removed; {REMOVED[name]}" in " ".join(refused.stderr.split())
    monkeypatch.setenv(variable(name), "1")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == f"{variable(name)}: this setting was removed; {REMOVED[name]}"


def test_what_kubernetes_sets_for_services_of_that_name_is_no_typo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "TIMESFORMER_SERVICE_HOST": "10.0.0.1",
        "TIMESFORMER_SERVICE_PORT_HTTP": "8000",
        "TIMESFORMER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "TIMESFORMER_GPU_SERVICE_PORT": "8000",
        "TIMESFORMER_GPU_PORT": "tcp://10.0.0.1:8000",
        "TIMESFORMER_GPU_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    }.items():
        monkeypatch.setenv(name, value)
    assert load_settings().port == 8000


def test_the_port_that_kubernetes_overwrites_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMESFORMER_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match=r"TIMESFORMER_PORT: .*enableServiceLinks: false"):
        load_settings()


def test_a_wrong_setting_ends_the_command_with_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMESFORMER_PROT", "1")
    result = CliRunner().invoke(cli, ["serve"])
    assert result.exit_code == 2
    assert "did you mean TIMESFORMER_PORT?" in result.stderr
