"""From weights to a served artefact, the bundle; and the runtimes that execute one."""

import os

# ONNX Runtime 1.32 has telemetry on Linux too, and reads this when it is first imported. Whoever
# wants to send it sets 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
