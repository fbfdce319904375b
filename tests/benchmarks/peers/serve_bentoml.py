"""BentoML; it takes no raw bodies for batches, so the clip comes as a form."""

from pathlib import Path

import bentoml
import numpy as np
from engine import MAX_BATCH, Engine


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Peer:
    def __init__(self):
        self.engine = Engine()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=60_000)
    def infer(self, frames: list[Path]) -> list[list[float]]:
        answers = self.engine.run([path.read_bytes() for path in frames])
        return [np.frombuffer(answer, np.float32).tolist() for answer in answers]
