"""KServe's own client against a running server; what it was told goes to stdout as JSON.

    python client.py http://127.0.0.1:8000 demo CLIPS.npy

Run by the Python of `make kserve-client`, never by the project's.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


async def main(url: str, model: str, path: str) -> None:
    clips = np.load(path)
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60))
    found: dict[str, Any] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, model),
        "other_ready": await client.is_model_ready(url, "other"),
    }
    for name, binary in (("binary", True), ("json", False)):
        frames = InferInput("frames", list(clips.shape), "UINT8")
        frames.set_data_from_numpy(clips, binary_data=binary)
        outputs = [
            RequestedOutput(output, parameters={"binary_data": binary})
            for output in ("logits", "embedding")
        ]
        request = InferRequest(model, [frames], request_id=name, request_outputs=outputs)
        response = await client.infer(url, request, model_name=model)
        found[name] = {
            "id": response.id,
            "model": response.model_name,
            **{output.name: output.as_numpy().tolist() for output in response.outputs},
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
