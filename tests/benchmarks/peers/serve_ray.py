"""Ray Serve; the clip is the raw body."""

import sys
import time

import ray
from engine import MAX_BATCH, WAIT_S, Engine
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=256)
class Peer:
    def __init__(self):
        self.engine = Engine()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_S)
    async def infer(self, clips):
        return self.engine.run(clips)

    async def __call__(self, request: Request):
        answer = await self.infer(await request.body())
        return Response(answer, media_type="application/octet-stream")


if __name__ == "__main__":
    ray.init(
        "local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Peer.bind(), route_prefix="/infer")
    while True:
        time.sleep(3600)
