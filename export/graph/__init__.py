"""The network comes in, ONNX graphs go out: exact rewrites, float32, FP16, INT8 and FP8.

This package does not know bundles. `export/verification/` proves the answers of its graphs.
"""
