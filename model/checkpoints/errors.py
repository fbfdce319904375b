"""The one error of reading and writing checkpoints."""


class CheckpointError(Exception):
    """Weights that cannot be loaded or written; the message says why and what to do."""
