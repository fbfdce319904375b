"""The pydantic models of requests and responses under `/v1`.

JSON and query parameters come in, checked values go out. Schemas know no socket
and no engine.
"""
