"""The network: clips come in, logits and an embedding go out.

This package does not know checkpoints of others, videos or training.
"""
