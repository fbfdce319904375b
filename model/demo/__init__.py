"""The bundled demo model: a ready bundle, so that serving it needs no torch, and its recipe."""

from pathlib import Path

STORE = Path(__file__).parent / "bundles"
"""A bundle store with the one bundle `demo`."""

SAMPLE_CLIP = Path(__file__).parent / "clip.mp4"
"""A short rendered video that the demo model names; also what exports are verified on."""
