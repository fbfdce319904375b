PRAGMA journal_mode = WAL;
BEGIN TRANSACTION;
CREATE TABLE jobs (
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
INSERT INTO "jobs" VALUES(1,'job_done','ann','k','timeline','{}',NULL,10,'done',1,1.0,2.0,32503680000.0,NULL,NULL,'none',0,NULL,NULL,0);
INSERT INTO "jobs" VALUES(2,'job_failed','ann',NULL,'timeline','{}',NULL,10,'failed',1,1.0,2.0,32503680000.0,'{"code": "undecodable_video", "status": 422, "detail": "Gone."}','https://example.org/','waiting',0,32503680000.0,NULL,0);
INSERT INTO "jobs" VALUES(3,'job_waits','ann',NULL,'embed','{"crops": 1}',NULL,10,'queued',0,4.0,NULL,NULL,NULL,NULL,'none',0,NULL,NULL,0);
CREATE TABLE results (
    id TEXT PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    body BLOB NOT NULL
);
CREATE INDEX by_state ON jobs (state, seq);
CREATE INDEX by_owner ON jobs (owner, seq);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',3);
COMMIT;
