"""Which version of which model serves. Bundles come in, loaded engines with a queue go out.

This package knows nothing of HTTP or videos.
"""
