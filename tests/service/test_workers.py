"""Workers as processes of this one: started, counted, replaced, stopped. The service as a whole is
in `tests/e2e/test_workers.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.demo import SAMPLE_CLIP
from service.app import create_app, running
from service.merging import Sample
from service.settings import Settings, SettingsError, load_settings
from service.workers import Workers

pytestmark = pytest.mark.timeout(900)
VIDEO = SAMPLE_CLIP.read_bytes()


@contextlib.asynccontextmanager
async def workers_of(settings: Settings, spool: Path) -> AsyncIterator[Workers]:
    """Those of a service that has its spool elsewhere."""
    app = create_app(settings.model_copy(update={"spool_dir": spool}))
    async with running(app, behind_workers=True):
        state = app.state.service
        workers = Workers(settings, state.metrics, state.network, None, state.spool)
        try:
            yield workers
        finally:
            await workers.close()


def settings_of(tmp_path: Path, **more: Any) -> Settings:
    given = {"workers": 2, "decode_workers": 2, "device": "cpu", "port": 0, "spool_dir": tmp_path}
    return load_settings(**{**given, **more})


def run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(case())  # type: ignore[arg-type]


def pids(workers: Workers) -> list[int]:
    return [each._process.pid for each in workers._workers if each._process]  # type: ignore[misc]


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - it is of another process
        await asyncio.sleep(0.02)


async def answers(url: str, count: int) -> list[httpx.Response]:
    """Each over a connection of its own."""

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(timeout=300) as client:
            return await client.post(f"{url}/v1/classify", content=VIDEO)

    return await asyncio.gather(*(post() for _ in range(count)))


def test_workers_serve_are_counted_together_and_are_replaced(short_path: Path) -> None:
    answered = 'timesformer_requests_total{method="POST",route="/v1/classify",status="200"} '

    async def case() -> None:
        async with workers_of(settings_of(short_path), short_path) as workers:
            url = await workers.start()
            assert {each.status_code for each in await answers(url, 8)} == {200}
            assert f"{answered}8.0" in (await workers.render()).decode()

            first, second = pids(workers)
            os.kill(first, signal.SIGKILL)
            await until(lambda: first not in pids(workers) and len(pids(workers)) == 2)
            text = (await workers.render()).decode()
            assert f"{answered}8.0" in text, "what the killed worker had counted is lost"
            assert "timesformer_worker_restarts_total 1.0" in text
            # It was young: until it is up again its socket takes nothing, and the other all.
            assert {each.status_code for each in await answers(url, 8)} == {200}
            await until(lambda: sum(each.is_ready for each in workers._workers) == 2)
            assert second in pids(workers)
            assert f"{answered}16.0" in (await workers.render()).decode()

            workers.tell_stopping()
            (last,) = await answers(url, 1)
            assert (last.status_code, last.headers["connection"]) == (200, "close")
            ended = pids(workers)
            await workers.stop()
            assert not any(map(exists, ended))
            with pytest.raises(httpx.ConnectError):
                await answers(url, 1)

    run(case)


def test_a_worker_that_does_not_start_says_why(short_path: Path) -> None:
    async def case() -> None:
        settings = settings_of(short_path / "gone")
        async with workers_of(settings, short_path) as workers:
            with pytest.raises(SettingsError, match="TIMESFORMER_SPOOL_DIR: cannot write"):
                await workers.start()
        assert pids(workers) == []

    run(case)


def test_one_that_cannot_be_replaced_says_why_and_the_others_go_on(
    short_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, spool = short_path / "mine", short_path / "spool"
    mine.mkdir()
    spool.mkdir()

    async def case() -> None:
        async with workers_of(settings_of(mine), spool) as workers:
            url = await workers.start()
            mine.rename(short_path / "gone")
            os.kill(pids(workers)[0], signal.SIGKILL)
            await until(lambda: "TIMESFORMER_SPOOL_DIR: cannot write" in str(reasons(caplog)))
            (short_path / "gone").rename(mine)
            assert {each.status_code for each in await answers(url, 4)} == {200}
            await until(lambda: sum(each.is_ready for each in workers._workers) == 2)

    run(case)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "reason", "") for record in caplog.records]


def test_one_that_does_not_answer_is_killed_when_all_are_to_end(short_path: Path) -> None:
    async def case() -> None:
        async with workers_of(settings_of(short_path, workers=1), short_path) as workers:
            await workers.start()
            (pid,) = pids(workers)
            os.kill(pid, signal.SIGSTOP)
            assert b"timesformer_workers 1.0" in await workers.render()
        assert not exists(pid)

    run(case)


def test_one_that_hangs_is_replaced_and_what_it_last_told_stays(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.workers._ASK_EVERY_S", 0.1)
    monkeypatch.setattr("service.workers._SILENCE_S", 20.0)
    answered = 'timesformer_requests_total{method="POST",route="/v1/classify",status="200"} '

    async def case() -> None:
        async with workers_of(settings_of(short_path, workers=1), short_path) as workers:
            url = await workers.start()
            assert {each.status_code for each in await answers(url, 2)} == {200}
            (worker,) = workers._workers
            # Without a scrape: it tells by itself.
            await until(lambda: any(each.value == 2 for each in counted(worker.samples)))
            (hung,) = pids(workers)
            os.kill(hung, signal.SIGSTOP)
            await until(lambda: not exists(hung))
            await until(lambda: worker.is_ready)
            assert {each.status_code for each in await answers(url, 1)} == {200}
            text = (await workers.render()).decode()
            assert f"{answered}3.0" in text
            assert "timesformer_worker_restarts_total 1.0" in text

    run(case)
    assert "a worker hangs and is killed" in caplog.text


def counted(samples: list[Sample]) -> list[Sample]:
    return [
        sample
        for sample in samples
        if sample.name == "timesformer_requests_total" and sample.labels["route"] == "/v1/classify"
    ]


def test_a_spool_whose_path_is_too_long_for_sockets_is_refused(short_path: Path) -> None:
    deep = short_path / ("x" * 100)
    deep.mkdir()

    async def case() -> None:
        async with workers_of(settings_of(deep), deep):
            pass

    with pytest.raises(SettingsError, match=r"TIMESFORMER_SPOOL_DIR: .* is too long a path"):
        run(case)
