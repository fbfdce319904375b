"""The Open Inference Protocol under `/v2`: clips come in, logits and embeddings go out.

This package does not know videos: clients of `/v2` decode their videos themselves.
"""
