"""LitServe; it takes no raw bodies, so the clip comes as a form."""

import sys

import litserve
from engine import MAX_BATCH, WAIT_S, Engine
from fastapi import Request, Response


class Api(litserve.LitAPI):
    def setup(self, device):
        self.engine = Engine()

    def decode_request(self, request: Request):
        return request["frames"].file.read()

    def batch(self, inputs):
        return inputs

    def predict(self, clips):
        return self.engine.run(clips)

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return Response(content=output, media_type="application/octet-stream")


if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=WAIT_S, api_path="/infer")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
        access_log=False,
        generate_client_file=False,
    )
