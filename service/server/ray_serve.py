"""The same app on Ray Serve, for users who run Ray: `serve run service.server.ray_serve:app`.

Each replica is the whole service, made on its node from the environment; `deploy/ray` has the
RayService. Without Ray none of this is needed.
"""

from __future__ import annotations

from fastapi import FastAPI
from ray import serve

from service.observability import logs
from service.server.app import create_app
from service.settings import load_settings


def build_app() -> FastAPI:
    """Called in the replica: a loaded app with its metrics cannot be sent to one."""
    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)
    return create_app(settings)


app = serve.deployment(name="timesformer")(serve.ingress(build_app)()).bind()
