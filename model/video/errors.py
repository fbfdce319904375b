"""Every way a video file can fail, on one page.

VideoError
├── EmptyFile           zero bytes
├── UnsupportedFormat   a container or a codec that is not on our list
├── NoVideoStream       sound, subtitles, cover art: nothing that moves
├── UndecodableVideo    cannot be opened, or nothing in it decodes
├── TooFewFrames        a still picture
└── VideoTooLarge       more pixels, seconds or frames than the limits allow
"""

# ruff: noqa: N818 (the names say what is wrong with the file; "Error" would add nothing)

from __future__ import annotations

from typing import ClassVar


class VideoError(Exception):
    """A file that gives no clips. `str(error)` is a sentence for the person who sent the file.

    The sentence names no path: what a server calls a file is no business of its clients. `code` is
    stable and meant for programs.
    """

    code: ClassVar[str] = "video_error"


class EmptyFile(VideoError):
    code = "empty_file"


class UnsupportedFormat(VideoError):
    code = "unsupported_format"


class NoVideoStream(VideoError):
    code = "no_video_stream"


class UndecodableVideo(VideoError):
    code = "undecodable_video"


class TooFewFrames(VideoError):
    code = "too_few_frames"


class VideoTooLarge(VideoError):
    code = "video_too_large"
