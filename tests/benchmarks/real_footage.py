"""Does the demo model know motions of the real world's pictures? Known motions on real frames.

    python -m tests.benchmarks.real_footage FOLDER_OF_VIDEOS [--bundle STORE/NAME/VERSION]

A frame of every video becomes a surface that pans, zooms, turns, shakes ... as the renderer's
surfaces do; the result goes through an mp4 file, the decoder of serving and the bundle's engine.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.bundle import Bundle
from export.runtime import load_runtime
from model.demo import STORE, render
from model.demo.render import LABELS, Layer
from model.demo.textures import TEXELS, make_pyramid
from model.video import VideoError, load_clips, read_frames, resize_crop, to_rgb

SIZE = (128, 160)  # of the videos, height and width


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", type=Path)
    parser.add_argument("--bundle", type=Path, default=STORE / "demo" / "1")
    args = parser.parse_args()
    bundle = Bundle(args.bundle)
    runtime = load_runtime(bundle, "cpu")
    right = np.zeros((len(LABELS), 2), int)
    surfaces = [found for path in sorted(args.videos.iterdir()) for found in surface(path)]
    for number, picture in enumerate(surfaces):
        for index, label in enumerate(LABELS):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "clip.mp4"
                write_video(path, picture, label, np.random.default_rng([number, index]))
                clips = load_clips(path, bundle.config.preprocessing).frames
            answer = bundle.manifest.labels[int(runtime.run(clips).logits[0].argmax())]
            right[index] += answer == label, 1
    for label, (hits, clips_) in zip(LABELS, right, strict=True):
        print(f"{label:26} {hits / clips_:6.1%}")
    hits, count = right.sum(0)
    print(f"{hits / count:.1%} of {count} clips with frames of {len(surfaces)} videos")


def surface(path: Path) -> list[NDArray[np.float32]]:
    """A texture (side, side, 3) from a video's middle frame; none of what is no video, or flat."""

    def convert(frame: object, sar: float) -> NDArray[np.uint8]:
        picture = to_rgb(frame)  # type: ignore[arg-type]
        height, width = picture.shape[:2]
        scale = TEXELS / min(height, width)
        size = max(round(height * scale), TEXELS), max(round(width * scale), TEXELS)
        return resize_crop(picture, size, (0, (size[1] - TEXELS) // 2, TEXELS, TEXELS))

    try:
        reading = read_frames(str(path), lambda line: np.array([len(line.times) // 2]), convert)
    except VideoError:
        return []
    picture = reading.pictures[int(reading.indices[0])].astype(np.float32) / 255
    return [picture] if picture.std() > 0.03 else []


def write_video(
    path: Path, picture: NDArray[np.float32], label: str, rng: np.random.Generator
) -> None:
    """An mp4 of 1.2 s in which the picture moves as `label` says; a third of it is in view."""
    motion = render.make_motion(label, rng)
    layers = [Layer(make_pyramid(picture, None), (0.0, 0.0), 0.0, None, motion)]
    times = np.arange(36) / 30
    frames = render.take(layers, rng, times - times.mean(), SIZE, min(SIZE))
    render.encode(path, frames, 30, "libx264", {"crf": "23", "preset": "superfast"})


if __name__ == "__main__":
    main()
