"""The service: uploads and URLs of videos come in, action labels go out. Never imports torch.

A request goes through these folders: `api` -> `ingest` -> `decoding` -> `inference` -> `api`.
`registry` decides which version of a model answers, and `server` puts everything together.
"""
