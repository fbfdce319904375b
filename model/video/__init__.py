"""Video files to uint8 clips, with numpy and PyAV alone: what every model here sees of a video."""

from model.video.decode import Clips, Reading, VideoFacts, load_clips, probe, read_frames
from model.video.errors import (
    EmptyFile,
    NoVideoStream,
    TooFewFrames,
    UndecodableVideo,
    UnsupportedFormat,
    VideoError,
    VideoTooLarge,
)
from model.video.opening import Limits
from model.video.sampling import Timeline, sample
from model.video.transforms import Crops, crop_frame, resize_crop, spatial_views, to_rgb

__all__ = [
    "Clips",
    "Crops",
    "EmptyFile",
    "Limits",
    "NoVideoStream",
    "Reading",
    "Timeline",
    "TooFewFrames",
    "UndecodableVideo",
    "UnsupportedFormat",
    "VideoError",
    "VideoFacts",
    "VideoTooLarge",
    "crop_frame",
    "load_clips",
    "probe",
    "read_frames",
    "resize_crop",
    "sample",
    "spatial_views",
    "to_rgb",
]
