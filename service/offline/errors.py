"""Why an archive cannot be labelled."""

from __future__ import annotations


class LabellingError(Exception):
    """The run cannot begin or go on; the message says why and what to do."""
