"""A bundle with a TimeSformer of random weights.

python -m tests.benchmarks.peers.random_weights build/peers tiny
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.load.overload import make_store

if __name__ == "__main__":
    make_store(Path(sys.argv[1]), sys.argv[2])
    (Path(sys.argv[1]) / "weights.safetensors").unlink()
