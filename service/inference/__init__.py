"""Clips of many requests come in, logits and embeddings go out, in batches that are shared fairly.

This package knows nothing of HTTP, files or versions.
"""
