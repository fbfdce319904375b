"""`/`: a page to try the service with. One file, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
_PAGE = (Path(__file__).parents[1] / "web/index.html").read_text(encoding="utf-8")


def _policy(page: str) -> str:
    """A content security policy that lets this page's own script and style run, and no other."""

    def source(tag: str) -> str:
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    return (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; "
        "img-src data:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


_HEADERS = {"Content-Security-Policy": _policy(_PAGE), "X-Content-Type-Options": "nosniff"}


@router.get("/", response_class=HTMLResponse)
async def page() -> Response:
    """The page."""
    return HTMLResponse(_PAGE, headers=_HEADERS)
