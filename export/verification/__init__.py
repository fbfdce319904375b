"""The parity gate: an engine or a graph comes in, proof of its answers or a failure goes out.

Only `torch_reference` and `gpu_emulation` import torch.
"""
