"""`/`, a page to try the service with, and `/docs`, the API's description for people.

Both run their own script and style and no others; nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
_PAGE = (Path(__file__).parents[1] / "web/index.html").read_text(encoding="utf-8")
# The package is there for these files alone: Swagger UI as FastAPI's own page loads it from a CDN.
_ASSETS = importlib.resources.files("fastapi_offline") / "static"
_ASSET_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def _policy(script: str, style: str) -> dict[str, str]:
    """A content security policy that lets these run and no other."""
    return {
        "Content-Security-Policy": f"default-src 'none'; script-src {script}; style-src {style}; "
        "img-src data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    }


def _inline(page: str, tag: str) -> str:
    """The policy's name of the one script or style that stands in the page itself."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_HEADERS = _policy(_inline(_PAGE, "script"), _inline(_PAGE, "style"))


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """The page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)


@router.get("/docs", response_class=HTMLResponse)
async def docs(request: Request) -> Response:
    """Swagger UI over `/openapi.json`."""
    root = request.scope.get("root_path", "")
    html = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=f"{request.app.title} API",
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    page = bytes(html.body).decode()
    # Swagger UI sets styles on its elements.
    policy = _policy(f"'self' {_inline(page, 'script')}", "'self' 'unsafe-inline'")
    return HTMLResponse(page, headers=policy)


@router.get("/docs/{name}")
async def docs_asset(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> Response:
    """Swagger UI's script and style."""
    headers = {"Cache-Control": "public, max-age=86400"}
    return Response((_ASSETS / name).read_bytes(), headers=headers, media_type=_ASSET_TYPES[name])
