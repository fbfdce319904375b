"""API keys: who is let in, how much of it, and that a key is nowhere but with its owner."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from service.api.auth import ApiKey, KeyFileError, Keyring, new_key, read_keys, write_keys
from service.cli.main import cli
from service.errors import TooManyRequestsError
from service.server.app import create_app
from service.settings import SettingsError, load_settings
from tests.service.conftest import send
from tests.service.registry.test_models import publish, store, wait_until  # noqa: F401 - a fixture


def write(path: Path, **limits: Any) -> dict[str, str]:
    """A file with a key for each scope; returns the keys."""
    made = {scope: new_key() for scope in ("infer", "admin")}
    write_keys(
        path,
        tuple(
            ApiKey(name=scope, sha256=digest, scopes=(scope,), **limits)
            for scope, (_, digest) in made.items()
        ),
    )
    return {scope: key for scope, (key, _) in made.items()}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_nothing_but_health_and_page_answers(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    keys = write(tmp_path / "keys.json")
    with serve(api_keys_file=tmp_path / "keys.json", spool_dir=tmp_path) as client:
        for path in ("/health/live", "/health/ready", "/v2/health/ready", "/metrics", "/"):
            assert client.get(path).status_code == 200
        wrong = [{}, bearer("nonsense"), {"Authorization": "Bearer"}, {"X-API-Key": "é".encode()}]
        for headers in wrong:
            for answer in (
                client.get("/v1/models", headers=headers),
                client.post("/v1/classify", headers=headers, content=video.read_bytes()),
            ):
                assert answer.status_code == 401
                assert answer.json()["code"] == "unauthorized"
                assert answer.headers["www-authenticate"] == "Bearer"
            for answer in (
                client.get("/v2/models/demo", headers=headers),
                client.post("/v2/models/demo/infer", headers=headers, content=b"{}"),
            ):
                assert answer.status_code == 401
                assert "API key" in answer.json()["error"]
        content = video.read_bytes()
        for headers in (bearer(keys["infer"]), {"X-API-Key": keys["infer"]}, bearer(keys["admin"])):
            assert client.post("/v1/classify", headers=headers, content=content).status_code == 200


def test_keys_are_followed_when_the_file_changes_and_stay_when_it_breaks(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = write(path)["infer"]
    keyring = Keyring(path)
    assert keyring.find(first) is not None
    second = write(path)["infer"]
    assert keyring.find(first) is None
    assert keyring.find(second) is not None
    path.write_text("{")
    assert keyring.find(second) is not None
    path.unlink()
    assert keyring.find(second) is not None


def test_the_rate_of_a_key_is_limited_and_flows_back(tmp_path: Path) -> None:
    write(tmp_path / "keys.json", requests_per_minute=60)
    now = [0.0]
    keyring = Keyring(tmp_path / "keys.json", clock=lambda: now[0])
    key, other = read_keys(tmp_path / "keys.json")
    for _ in range(60):
        with keyring.use(key):
            pass
    with pytest.raises(TooManyRequestsError) as refusal, keyring.use(key):
        pass
    assert refusal.value.headers["Retry-After"] == "1"
    with keyring.use(other):
        pass  # every key has a rate of its own
    now[0] += 1.01
    with keyring.use(key):
        pass
    with pytest.raises(TooManyRequestsError), keyring.use(key):
        pass


def test_leaving_makes_no_room_for_more_than_a_key_may_run_at_once(
    serve: Any, video: Path, tmp_path: Path
) -> None:
    """The decoder of a client that disconnects is killed at once."""
    keys = write(tmp_path / "keys.json", max_concurrent=1)
    settings = {"api_keys_file": tmp_path / "keys.json", "decode_workers": 1, "spool_dir": tmp_path}
    others = multiprocessing.active_children()
    with serve(**settings) as client:
        (decoder,) = [child for child in multiprocessing.active_children() if child not in others]
        stopped = Path(f"/proc/{decoder.pid}")
        os.kill(decoder.pid, signal.SIGSTOP)
        content = video.read_bytes()
        with send(client, "/v1/classify", content, **bearer(keys["infer"])):
            wait_until(lambda: "decoders_busy 1.0" in client.get("/metrics").text, 120)
            refused = client.post("/v1/classify", content=content, headers=bearer(keys["infer"]))
            assert refused.status_code == 429
        wait_until(lambda: not stopped.exists(), 120)

        def admitted() -> bool:
            answer = client.post("/v1/classify", content=content, headers=bearer(keys["infer"]))
            return answer.status_code == 200

        wait_until(admitted, 120)


@pytest.mark.parametrize(
    "content",
    ["", "{", '{"keys": [{"name": "a"}]}', '{"keys": [], "other": 1}', "[]"],
)
def test_a_file_that_is_none_of_keys_is_refused_at_start(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(KeyFileError, match="is no file of API keys"):
        Keyring(path)


def test_a_service_that_cannot_read_its_keys_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"TIMESFORMER_API_KEYS_FILE: cannot read .*nowhere"):
        create_app(load_settings(api_keys_file=tmp_path / "nowhere"))


def test_an_error_never_repeats_what_stands_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "a", "sha256": "tsf_a-real-key", "scopes": ["infer"]}]}')
    with pytest.raises(KeyFileError) as error:
        read_keys(path)
    assert "tsf_a-real-key" not in str(error.value)
    assert error.value.__cause__ is None


def test_the_command_makes_lists_and_revokes_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    run = CliRunner().invoke
    made = run(cli, ["keys", "create", "ann", "--file", str(path), "--max-concurrent", "2"])
    assert made.exit_code == 0, made.output
    key = made.output.strip()
    assert Keyring(path).find(key) is not None
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = run(cli, ["keys", "create", "ann", "--file", str(path)])
    assert again.exit_code == 1
    listed = run(cli, ["keys", "list", "--file", str(path)]).output
    assert "ann" in listed
    assert key not in listed
    assert run(cli, ["keys", "create", "a b", "--file", str(path)]).exit_code == 2
    assert run(cli, ["keys", "revoke", "ann", "--file", str(path)]).exit_code == 0
    assert Keyring(path).find(key) is None
    assert run(cli, ["keys", "revoke", "ann", "--file", str(path)]).exit_code == 1
    assert run(cli, ["keys", "list", "--file", str(tmp_path / "none")]).exit_code == 1


# ---- the admin endpoints ----------------------------------------------------------------------


def test_only_an_admin_may_change_what_serves(serve: Any, tmp_path: Path) -> None:
    keys = write(tmp_path / "keys.json")
    with serve(api_keys_file=tmp_path / "keys.json", spool_dir=tmp_path) as client:
        answer = client.get("/v1/admin/models/demo", headers=bearer(keys["infer"]))
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
        answer = client.get("/v1/admin/models/demo", headers=bearer(keys["admin"]))
        assert answer.json()["serving"] == "1"


def test_without_keys_nobody_may(client: httpx.Client) -> None:
    answer = client.post("/v1/admin/models/demo/rollback")
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")


@pytest.mark.parametrize("scope", [None, "infer"])
def test_a_body_is_not_waited_for_before_the_key(
    serve: Any, tmp_path: Path, scope: str | None
) -> None:
    keys = write(tmp_path / "keys.json")
    with serve(api_keys_file=tmp_path / "keys.json", spool_dir=tmp_path) as client:
        key = bearer(keys[scope]) if scope else {}
        url = "/v1/admin/models/demo/candidate"
        with send(client, url, length=100_000_000, method="PUT", **key) as sender:
            assert sender.recv(100).split()[1] == (b"403" if scope else b"401")


def test_an_administrators_body_has_limits_too(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.ingest.upload_rate._WINDOW_S", 1.0)
    headers = bearer(write(tmp_path / "keys.json")["admin"])
    url = "/v1/admin/models/demo/candidate"

    with serve(
        api_keys_file=tmp_path / "keys.json", spool_dir=tmp_path, min_upload_rate=100
    ) as client:
        for content, status, code in (
            (b" " * 20_000, 413, "upload_too_large"),
            ((b" " * 1000 for _ in range(20)), 413, "upload_too_large"),
            (b"version=2", 400, "bad_request"),
            (b"", 400, "bad_request"),
            (b"[]", 422, "invalid_parameters"),
            (b'{"version": "2"}', 422, "invalid_parameters"),
        ):
            answer = client.put(url, headers=headers, content=content)
            assert (answer.status_code, answer.json()["code"]) == (status, code)
        with send(client, url, length=9, method="PUT", **headers) as silent:
            assert silent.recv(100).split()[1] == b"408"


def test_an_admin_activates_and_rolls_back_and_is_refused_what_cannot_run(
    serve: Any,
    store: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    publish(store, graph=b"no graph at all")
    admin = bearer(write(tmp_path / "keys.json")["admin"])
    settings = {"api_keys_file": tmp_path / "keys.json", "watch_interval_s": 0}
    with serve(store=store.root, **settings) as client:
        client.headers.update(admin)
        url = "/v1/admin/models/demo"
        for path in ("rollback", *(f"versions/{name}/activate" for name in ("3", "99", "none"))):
            answer = client.post(f"{url}/{path}")
            assert (answer.status_code, answer.json()["code"]) == (409, "bundle_refused")
        assert store.active("demo") == client.get(url).json()["serving"] == "1"
        done = client.post(f"{url}/versions/2/activate")
        assert done.json() == {"name": "demo", "version": "2"}
        assert client.get(url).json() == {
            "name": "demo",
            "versions": ["1", "2", "3"],
            "history": ["2", "1"],
            "serving": "2",
            "refused": None,
            "candidate": None,
        }
        assert client.post(f"{url}/rollback").json()["version"] == "1"
        assert store.active("demo") == "1"
        assert client.get("/health/ready").json()["model"]["version"] == "1"
