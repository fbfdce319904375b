"""The jobs' database: one state each, ended once, whatever ends the process between two calls."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from service.jobs.store import JobStore, NewJob, StoredJob, TooManyWaitError

ERROR = {"code": "job_abandoned", "status": 422, "detail": "Gone."}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def new(identifier: str, **fields: object) -> NewJob:
    given = {
        "owner": "ann",
        "idempotency": None,
        "kind": "timeline",
        "parameters": {"window": 2.0},
        "source": None,
        "size": 10,
        "webhook": None,
    }
    return NewJob(identifier, **{**given, **fields})  # type: ignore[arg-type]


def claim(store: JobStore, now: float = 2.0) -> StoredJob:
    job = store.claim(now)
    assert job is not None
    return job


def test_jobs_are_claimed_in_their_order_and_each_once(store: JobStore) -> None:
    for name in "abc":
        store.add(new(name), 10, 1.0)
    assert [claim(store).id for _ in range(3)] == ["a", "b", "c"]
    assert store.claim(3.0) is None
    assert store.get("a").attempts == 1
    assert store.get("a").parameters == {"window": 2.0}


def test_others_cannot_read_the_file(tmp_path: Path, store: JobStore) -> None:
    assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o077 == 0


def test_a_run_ends_once(store: JobStore) -> None:
    store.add(new("a"), 10, 1.0)
    job = claim(store)
    assert store.finish(job, 3.0, None)
    assert not store.finish(job, 4.0, ERROR)
    assert store.get("a").state == "done"
    assert store.done() == {"a"}


def test_a_run_that_was_cancelled_has_no_say(store: JobStore) -> None:
    store.add(new("a"), 10, 1.0)
    job = claim(store)
    assert store.cancel("a", 3.0)
    assert not store.finish(job, 4.0, None)
    assert not store.put_off(job, 4.0)
    assert store.get("a").state == "cancelled"
    assert store.done() == set()
    assert not store.cancel("a", 5.0)


def test_what_is_put_off_waits_for_its_time_holds_nobody_up_and_counts_no_attempt(
    store: JobStore,
) -> None:
    store.add(new("a"), 10, 1.0)
    store.add(new("b"), 10, 1.0)
    assert store.put_off(claim(store, 2.0), 9.0)
    job = store.get("a")
    assert (job.state, job.attempts, job.delays) == ("queued", 0, 1)
    assert claim(store, 3.0).id == "b"
    assert store.claim(8.9) is None
    assert store.next_due() == 9.0
    assert claim(store, 9.0).id == "a"
    assert store.next_due() is None


def test_what_ran_when_the_process_was_killed_is_queued_again(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    first = JobStore(path)
    first.add(new("a"), 10, 1.0)
    first.add(new("b"), 10, 1.0)
    old = claim(first)
    second = JobStore(path)  # the first is not closed
    second.recover(3, ERROR, 5.0)
    assert claim(second).id == "a"
    assert not second.finish(old, 6.0, None), "a run of the dead server has no say"
    assert claim(second).id == "b"


def test_a_job_that_ends_the_service_again_and_again_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(path)
    store.add(new("a", webhook="https://example.org/"), 10, 1.0)
    for _ in range(3):
        assert claim(store).id == "a"
        store = JobStore(path)
        store.recover(3, ERROR, 5.0)
    job = store.get("a")
    assert (job.state, job.error, job.hook_due) == ("failed", ERROR, 5.0)


def test_a_stop_counts_as_no_attempt(store: JobStore) -> None:
    store.add(new("a"), 10, 1.0)
    claim(store)
    store.give_back()
    job = store.get("a")
    assert (job.state, job.attempts) == ("queued", 0)


def test_one_idempotency_key_of_one_owner_makes_one_job(store: JobStore) -> None:
    first = store.add(new("a", idempotency="k"), 10, 1.0)
    assert store.add(new("b", idempotency="k"), 10, 2.0) == first
    assert store.add(new("c", idempotency="k", owner="bob"), 10, 2.0).id == "c"
    assert store.add(new("d"), 10, 2.0).id == "d"


def test_no_more_wait_than_allowed(store: JobStore) -> None:
    store.add(new("a", idempotency="k"), 1, 1.0)
    with pytest.raises(TooManyWaitError):
        store.add(new("b"), 1, 1.0)
    assert store.add(new("c", idempotency="k"), 1, 1.0).id == "a"
    claim(store)
    store.add(new("b"), 1, 1.0)


def test_pages_go_from_new_to_old_by_owner(store: JobStore) -> None:
    for name in "abcd":
        store.add(new(name, owner="bob" if name == "c" else "ann"), 10, 1.0)
    assert [job.id for job in store.page("ann", None, 2)] == ["d", "b"]
    assert [job.id for job in store.page("ann", store.get("b").seq, 2)] == ["a"]
    assert [job.id for job in store.page(None, None, 9)] == ["d", "c", "b", "a"]


def test_ended_jobs_go_after_their_time_but_not_before_their_webhook_is_through(
    store: JobStore,
) -> None:
    store.add(new("a"), 10, 1.0)
    store.add(new("b", webhook="https://example.org/"), 10, 1.0)
    for _ in range(2):
        store.finish(claim(store), 3.0, None)
    assert store.remove_ended_before(2.0) == []
    assert store.remove_ended_before(4.0) == ["a"]
    store.note_hook("b", "delivered", None)
    assert store.remove_ended_before(4.0) == ["b"]


def test_webhooks_are_due_when_their_time_has_come(store: JobStore) -> None:
    store.add(new("a", webhook="https://example.org/"), 10, 1.0)
    assert store.next_hook() is None
    store.finish(claim(store), 3.0, None)
    assert store.next_hook() == 3.0
    assert [job.id for job in store.hooks_due(3.0, 8)] == ["a"]
    store.note_hook("a", "waiting", 9.0)
    assert store.hooks_due(8.0, 8) == []
    assert store.hooks_due(9.0, 8)[0].hook_attempts == 1


def test_what_fails_in_the_middle_leaves_nothing(store: JobStore) -> None:
    store.add(new("a"), 10, 1.0)
    job = claim(store)
    with pytest.raises(sqlite3.ProgrammingError):
        store.finish(job, object(), None)  # type: ignore[arg-type]
    assert store.get("a").state == "running"
    assert store.finish(job, 3.0, None)
