"""Jobs in SQLite: what was accepted, what became of it, and whom to tell. One thread uses it.

Every change is one transaction, on the disk when the call returns (WAL, synchronous FULL): after
`kill -9` a job is in exactly one state. What came of it is a file (`service/jobs/results.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
STATES: tuple[JobState, ...] = ("queued", "running", "done", "failed", "cancelled")
HookState = Literal["none", "waiting", "delivered", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    idempotency TEXT,
    kind TEXT NOT NULL,
    parameters TEXT NOT NULL,
    source TEXT,
    size INTEGER NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    error TEXT,
    webhook TEXT,
    hook_state TEXT NOT NULL,
    hook_attempts INTEGER NOT NULL DEFAULT 0,
    hook_due REAL,
    due REAL,
    delays INTEGER NOT NULL DEFAULT 0,
    UNIQUE (owner, idempotency)
);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, seq);
CREATE INDEX IF NOT EXISTS by_owner ON jobs (owner, seq);
"""


@dataclass(frozen=True)
class StoredJob:
    """A row. Times are seconds since 1970; `error` has code, status and detail."""

    seq: int
    id: str
    owner: str
    idempotency: str | None
    kind: str
    parameters: Mapping[str, Any]
    source: str | None
    size: int
    state: JobState
    attempts: int
    created: float
    started: float | None
    finished: float | None
    error: Mapping[str, Any] | None
    webhook: str | None
    hook_state: HookState
    hook_attempts: int
    hook_due: float | None
    due: float | None
    """When it may be claimed, if it was put off."""
    delays: int
    """How often it was."""


@dataclass(frozen=True)
class NewJob:
    """What is accepted."""

    id: str
    owner: str
    idempotency: str | None
    kind: str
    parameters: Mapping[str, Any]
    source: str | None
    size: int
    webhook: str | None


class TooManyWaitError(Exception):
    """So many jobs are queued that no more are taken."""


class JobStore:
    """The database of one server."""

    def __init__(self, path: Path) -> None:
        # Not for others to read: sources may be presigned URLs.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    def recover(self, most_attempts: int, error: Mapping[str, Any], now: float) -> None:
        """What ran when the last server was killed is queued again, or given up."""
        with self._change():
            self._db.execute(
                "UPDATE jobs SET state = 'failed', finished = ?, error = ?, source = NULL, "
                "hook_due = CASE hook_state WHEN 'waiting' THEN ? END "
                "WHERE state = 'running' AND attempts >= ?",
                (now, json.dumps(error), now, most_attempts),
            )
            self._db.execute("UPDATE jobs SET state = 'queued' WHERE state = 'running'")

    def give_back(self) -> None:
        """Queues what runs again, as if it had never begun: the server stops."""
        with self._change():
            self._db.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - 1 WHERE state = 'running'"
            )

    def add(self, job: NewJob, most_waiting: int, now: float) -> StoredJob:
        """Accepts a job, or finds the one of the same owner with the same idempotency key.

        Raises:
            TooManyWaitError: it is a new one and there is no room.
        """
        with self._change():
            if found := self.find_repeated(job.owner, job.idempotency):
                return found
            if self.counts()["queued"] >= most_waiting:
                raise TooManyWaitError
            hook = "none" if job.webhook is None else "waiting"
            self._db.execute(
                "INSERT INTO jobs (id, owner, idempotency, kind, parameters, source, size, state, "
                "created, webhook, hook_state) VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?)",
                (
                    job.id,
                    job.owner,
                    job.idempotency,
                    job.kind,
                    json.dumps(dict(job.parameters)),
                    job.source,
                    job.size,
                    now,
                    job.webhook,
                    hook,
                ),
            )
        return self.get(job.id)

    def find_repeated(self, owner: str, idempotency: str | None) -> StoredJob | None:
        """The job that an earlier request with the same key made."""
        if idempotency is None:
            return None
        return self._one("owner = ? AND idempotency = ?", owner, idempotency)

    def get(self, identifier: str) -> StoredJob:
        """Raises `KeyError` if there is no such job."""
        job = self._one("id = ?", identifier)
        if job is None:
            raise KeyError(identifier)
        return job

    def page(self, owner: str | None, before: int | None, limit: int) -> list[StoredJob]:
        """Newest first; of all owners for None."""
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE (?1 IS NULL OR owner = ?1) AND (?2 IS NULL OR seq < ?2) "
            "ORDER BY seq DESC LIMIT ?3",
            (owner, before, limit),
        )
        return [_job(row) for row in rows]

    def claim(self, now: float) -> StoredJob | None:
        """The oldest queued job that is not put off, which runs from here on."""
        with self._change():
            job = self._one(
                "state = 'queued' AND (due IS NULL OR due <= ?) ORDER BY seq LIMIT 1", now
            )
            if job is None:
                return None
            self._db.execute(
                "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1 "
                "WHERE id = ?",
                (now, job.id),
            )
        return self.get(job.id)

    def next_due(self) -> float | None:
        """When the next of the jobs that were put off may be claimed."""
        row = self._db.execute("SELECT min(due) AS due FROM jobs WHERE state = 'queued'").fetchone()
        return None if row["due"] is None else float(row["due"])

    def put_off(self, job: StoredJob, due: float) -> bool:
        """Queues what runs again, for later, as if it had not begun; False as of `finish`."""
        with self._change():
            changed = self._db.execute(
                "UPDATE jobs SET state = 'queued', attempts = attempts - 1, due = ?, "
                "delays = delays + 1 WHERE id = ? AND state = 'running' AND attempts = ?",
                (due, job.id, job.attempts),
            ).rowcount
        return changed == 1

    def finish(self, job: StoredJob, now: float, error: Mapping[str, Any] | None) -> bool:
        """Stores that a run has ended, well without an error; False if the job was cancelled or
        taken up anew meanwhile.
        """
        with self._change():
            changed = self._db.execute(
                "UPDATE jobs SET state = ?, finished = ?, error = ?, source = NULL, "
                "hook_due = CASE hook_state WHEN 'waiting' THEN ? END "
                "WHERE id = ? AND state = 'running' AND attempts = ?",
                (
                    "done" if error is None else "failed",
                    now,
                    None if error is None else json.dumps(dict(error)),
                    now,
                    job.id,
                    job.attempts,
                ),
            ).rowcount
        return changed == 1

    def cancel(self, identifier: str, now: float) -> bool:
        """Ends a job that has no result yet; False if it has ended already."""
        with self._change():
            changed = self._db.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ?, source = NULL, "
                "hook_due = CASE hook_state WHEN 'waiting' THEN ? END "
                "WHERE id = ? AND state IN ('queued', 'running')",
                (now, now, identifier),
            ).rowcount
        return changed == 1

    def remove(self, identifier: str) -> None:
        """Forgets a job that has ended, and its result."""
        with self._change():
            self._db.execute("DELETE FROM jobs WHERE id = ?", (identifier,))

    def remove_ended_before(self, moment: float) -> list[str]:
        """Forgets jobs that ended before and have nobody left to tell; returns which."""
        ended = "finished < ? AND hook_state != 'waiting'"
        with self._change():
            rows = self._db.execute(f"SELECT id FROM jobs WHERE {ended}", (moment,)).fetchall()  # noqa: S608 - a text of two lines above
            self._db.execute(f"DELETE FROM jobs WHERE {ended}", (moment,))  # noqa: S608 - as above
        return [row["id"] for row in rows]

    def done(self) -> set[str]:
        """Jobs that have a result."""
        return {row["id"] for row in self._db.execute("SELECT id FROM jobs WHERE state = 'done'")}

    def unfinished(self) -> dict[str, int]:
        """Jobs whose videos are still needed, with their size."""
        rows = self._db.execute("SELECT id, size FROM jobs WHERE state IN ('queued', 'running')")
        return {row["id"]: row["size"] for row in rows}

    def counts(self) -> dict[JobState, int]:
        """Jobs in each state."""
        rows = self._db.execute("SELECT state, count(*) AS jobs FROM jobs GROUP BY state")
        found = {row["state"]: row["jobs"] for row in rows}
        return {state: found.get(state, 0) for state in STATES}

    def hooks_due(self, now: float, most: int) -> list[StoredJob]:
        """Ended jobs whose webhook is to be called."""
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE hook_state = 'waiting' AND hook_due <= ? "
            "ORDER BY hook_due LIMIT ?",
            (now, most),
        )
        return [_job(row) for row in rows]

    def next_hook(self) -> float | None:
        """When the next webhook is to be called."""
        row = self._db.execute(
            "SELECT min(hook_due) AS due FROM jobs WHERE hook_state = 'waiting'"
        ).fetchone()
        return None if row["due"] is None else float(row["due"])

    def note_hook(self, identifier: str, state: HookState, due: float | None) -> None:
        """What came of a call, and when the next one is."""
        with self._change():
            self._db.execute(
                "UPDATE jobs SET hook_state = ?, hook_due = ?, hook_attempts = hook_attempts + 1 "
                "WHERE id = ?",
                (state, due, identifier),
            )

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _one(self, condition: str, *values: object) -> StoredJob | None:
        # The conditions are those of this file.
        row = self._db.execute(f"SELECT * FROM jobs WHERE {condition}", values).fetchone()  # noqa: S608
        return None if row is None else _job(row)


def _job(row: sqlite3.Row) -> StoredJob:
    fields = dict(row)
    fields["parameters"] = json.loads(fields["parameters"])
    fields["error"] = None if fields["error"] is None else json.loads(fields["error"])
    return StoredJob(**fields)
