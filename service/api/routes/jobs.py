"""`/v1/jobs`: long videos that are accepted now and done later."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from service.api.auth import ApiKey
from service.api.dependencies import Running, State
from service.api.schemas.jobs import JobError, JobList, JobProgress, JobRequest, JobStatus
from service.api.schemas.openapi import inlined_schema
from service.api.video_requests import PROBLEM_RESPONSES, of_body, problem_response, video_body
from service.errors import JobsOffError
from service.inference.results import Classification, Embedding, TimelineResult
from service.ingest.multipart import SOURCE_FIELD
from service.ingest.upload_rate import Pace
from service.ingest.uploads import receive
from service.jobs.manager import Jobs
from service.jobs.runner import parse
from service.jobs.store import StoredJob

router = APIRouter(prefix="/v1", tags=["jobs"])
_OFF: dict[int | str, dict[str, Any]] = {
    409: problem_response("This service keeps no jobs, or the job has no result.")
}
_FEW: dict[int | str, dict[str, Any]] = {
    **{status: PROBLEM_RESPONSES[status] for status in (401, 403, 429, 503)},
    **_OFF,
}
_ONE = {**_FEW, 404: problem_response("There is no such job.")}


@router.post(
    "/jobs",
    status_code=202,
    responses={**PROBLEM_RESPONSES, **_OFF},
    openapi_extra={"requestBody": video_body(JobRequest)},
    summary="Accept a long video to be done later",
)
async def submit(
    request: Request,
    response: Response,
    state: Running,
    idempotency: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            description="Of the client's making: a second request with the same key makes no "
            "second job and gets the first one's, whatever it asks for.",
        ),
    ] = None,
) -> JobStatus:
    """Receives the video, or notes its URL, and answers once the job is safe on the disk. `kind`
    is one of the parameters, which are in the query, the form or the JSON object.
    """
    jobs, settings = _jobs(state), state.settings
    owner = _owner(request)
    if found := await jobs.find_repeated(owner, idempotency):
        return _accepted(response, jobs, found)
    await jobs.refuse_if_full()
    async with receive(
        request,
        jobs.incoming,
        settings.max_long_upload_bytes,
        Pace.of_long(settings),
        sources=None,
    ) as upload:
        fields = dict(upload.fields)
        source = fields.pop(SOURCE_FIELD, None)
        if source is not None:
            state.sources.check(source)
        asked = of_body(JobRequest, {**request.query_params, **fields})
        given = asked.model_dump(exclude_unset=True, exclude={"kind", "webhook"})
        parameters = parse(asked.kind, given, settings.max_clips_per_request)
        state.models.find(parameters.model)
        jobs.check_webhook(asked.webhook)
        job = await jobs.add(
            None if source is not None else upload.path,
            upload.size,
            owner=owner,
            idempotency=idempotency,
            kind=asked.kind,
            parameters=parameters.model_dump(mode="json", exclude_unset=True),
            source=source,
            webhook=asked.webhook,
        )
    return _accepted(response, jobs, job)


@router.get(
    "/jobs",
    responses={**_ONE, 422: problem_response("A parameter is wrong.")},
    summary="List jobs",
)
async def list_jobs(
    request: Request,
    state: Running,
    limit: Annotated[int, Query(ge=1, le=1000, description="Most jobs of a page.")] = 100,
    before: Annotated[
        str | None, Query(max_length=64, description="`next` of the page before.")
    ] = None,
) -> JobList:
    """The jobs of the key that asks, or with the scope `admin` all of them; newest first."""
    jobs = _jobs(state)
    found = await jobs.page(_reader(request), before, limit + 1)
    shown = found[:limit]
    return JobList(
        jobs=tuple(status_of(job, jobs) for job in shown),
        next=shown[-1].id if len(found) > limit else None,
    )


@router.get("/jobs/{identifier}", responses=_ONE, summary="Say how a job stands")
async def status(identifier: str, request: Request, state: Running) -> JobStatus:
    """State, progress, and what it failed with."""
    jobs = _jobs(state)
    return status_of(await jobs.find(identifier, _reader(request)), jobs)


@router.get(
    "/jobs/{identifier}/result",
    response_class=Response,
    responses={
        200: {
            "description": "By the job's kind.",
            "content": {
                "application/json": {
                    "schema": {
                        "oneOf": [
                            inlined_schema(model)
                            for model in (Classification, Embedding, TimelineResult)
                        ]
                    }
                }
            },
        },
        **PROBLEM_RESPONSES,
        **_ONE,
    },
    summary="Get what came of a job",
)
async def result(identifier: str, request: Request, state: Running) -> Response:
    """The result; of a job that failed, the problem that it failed with."""
    jobs = _jobs(state)
    job = await jobs.find(identifier, _reader(request))
    size, blocks = await jobs.result(job)
    headers = {"Content-Length": str(size)}
    return StreamingResponse(blocks, headers=headers, media_type="application/json")


@router.delete("/jobs/{identifier}", responses=_ONE, summary="Cancel or forget a job")
async def cancel(identifier: str, request: Request, state: Running) -> JobStatus:
    """Ends a job that waits or runs; removes one that has ended, with its result."""
    jobs = _jobs(state)
    job = await jobs.find(identifier, _reader(request))
    return status_of(await jobs.cancel(job), jobs)


def status_of(job: StoredJob, jobs: Jobs | None = None) -> JobStatus:
    """What clients are told of a job."""
    progress = jobs.progress.get(job.id) if jobs is not None else None
    return JobStatus.model_validate(
        {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "created": _moment(job.created),
            "started": _moment(job.started),
            "finished": _moment(job.finished),
            "attempts": job.attempts,
            "bytes": job.size,
            "parameters": dict(job.parameters),
            "progress": JobProgress(**progress._asdict()) if progress else None,
            "error": JobError(**job.error) if job.error else None,
            "webhook": job.hook_state,
        }
    )


def hook_body(job: StoredJob) -> bytes:
    """What a webhook is told: the job's status."""
    return status_of(job).model_dump_json(exclude={"webhook"}).encode()


def _accepted(response: Response, jobs: Jobs, job: StoredJob) -> JobStatus:
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return status_of(job, jobs)


def _jobs(state: State) -> Jobs:
    if state.jobs is None:
        raise JobsOffError("This service keeps no jobs: TIMESFORMER_JOBS_DIR is not set.")
    return state.jobs


def _owner(request: Request) -> str:
    """Whose a new job is: the name of the key, or nobody's where there are none."""
    key: ApiKey | None = request.state.api_key
    return "" if key is None else key.name


def _reader(request: Request) -> str | None:
    """Whose jobs may be seen; None: anyone's."""
    key: ApiKey | None = request.state.api_key
    return None if key is not None and "admin" in key.scopes else _owner(request)


def _moment(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
