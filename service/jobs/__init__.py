"""Long videos that are accepted now and done later: a video comes in, a stored result goes out.

Jobs survive a restart. This package knows nothing of HTTP but the calls of webhooks.
"""
