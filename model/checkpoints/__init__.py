"""Checkpoints in and out: whatever weights there are, to our names and back.

Read are official `.pyth` files, Hugging Face folders and hub names, our own safetensors, and image
ViTs (timm, Hugging Face) as initialisation; written are the official and Hugging Face layouts and
ours. Nothing here executes code from a file: pickles are read with `weights_only`.

    errors.py   CheckpointError
    layouts.py  how each family of files names our tensors
    files.py    from a path or hub name to tensors under the file's names, and what the file states
    load.py     from there to a `Checkpoint`: architecture, fit, resizing, initialisation from ViTs
    save.py     back to files
"""

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, load_checkpoint
from model.checkpoints.save import save_huggingface, save_official, save_safetensors

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "load_checkpoint",
    "save_huggingface",
    "save_official",
    "save_safetensors",
]
