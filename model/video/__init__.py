"""Video files to uint8 clips, with numpy and PyAV alone: what every model here sees of a video."""

from model.video.decode import Clips, Reading, load_clips, probe, read_frames
from model.video.errors import (
    EmptyFile,
    NoVideoStream,
    TooFewFrames,
    UndecodableVideo,
    UnsupportedFormat,
    VideoError,
    VideoTooLarge,
)
from model.video.facts import VideoFacts
from model.video.opening import Limits
from model.video.sampling import Timeline, sample
from model.video.transforms import Crops, crop_frame, resize_crop, spatial_views, to_rgb
from model.video.windows import (
    Cut,
    Ended,
    Opened,
    Window,
    WindowError,
    make_cut,
    stream_windows,
)

__all__ = [
    "Clips",
    "Crops",
    "Cut",
    "EmptyFile",
    "Ended",
    "Limits",
    "NoVideoStream",
    "Opened",
    "Reading",
    "Timeline",
    "TooFewFrames",
    "UndecodableVideo",
    "UnsupportedFormat",
    "VideoError",
    "VideoFacts",
    "VideoTooLarge",
    "Window",
    "WindowError",
    "crop_frame",
    "load_clips",
    "make_cut",
    "probe",
    "read_frames",
    "resize_crop",
    "sample",
    "spatial_views",
    "stream_windows",
    "to_rgb",
]
