"""The builder of TensorRT plans, its cache and its inspector: a graph comes in, a plan goes out.

`export/runtime/tensorrt.py` runs the plans.
"""
