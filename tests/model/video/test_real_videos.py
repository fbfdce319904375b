"""51 files from the wild, each with what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.config import Preprocessing
from model.video import (
    EmptyFile,
    NoVideoStream,
    TooFewFrames,
    UndecodableVideo,
    VideoError,
    load_clips,
)

VIDEOS = Path(__file__).parents[3].parent / "shared" / "videos"
pytestmark = pytest.mark.skipif(not VIDEOS.is_dir(), reason="the real videos are not here")

SEEN = Preprocessing(image_size=96)

# file: frames, displayed width and height, clockwise rotation, duration, truncated
SOUND: dict[str, tuple[int, int, int, int, float, bool]] = {
    "av1_hdr10_10bit_1080p.mp4": (60, 1920, 1080, 0, 1.00, False),
    "av1_mp4_1080x720.mp4": (30, 1080, 720, 0, 1.00, False),
    "flv1_flv_268x156.flv": (25, 268, 156, 0, 0.73, False),
    "h264_4k60_rot90_portrait.mp4": (18, 2160, 3840, 90, 0.30, False),
    "h264_avi_1080p_ntu.avi": (103, 1920, 1080, 0, 3.43, False),
    "h264_bikes_640x272_scenecuts.mp4": (250, 640, 272, 0, 10.00, False),
    "h264_carphone_176x144_sar.mp4": (120, 193, 144, 0, 4.00, False),
    "h264_chaplin_640x360.mp4": (241, 640, 360, 0, 9.64, False),
    "h264_flv_1080x720_fps1000.flv": (30, 1080, 720, 0, 1.00, False),
    "h264_fragmented.mp4": (30, 1080, 720, 0, 1.00, False),
    "h264_fullrange_720p.mp4": (30, 1280, 720, 0, 1.00, False),
    "h264_hlg_2x2.mp4": (3, 2, 2, 0, 0.12, False),
    "h264_mdat_too_long.mp4": (30, 1080, 720, 0, 1.00, False),
    "h264_mkv_426x240_no_nbframes.mkv": (310, 426, 240, 0, 10.33, False),
    "h264_mkv_truncated_claims_1132s.mkv": (37, 720, 404, 0, 1.58, True),
    "h264_mov_rot0.mov": (3, 568, 320, 0, 0.10, False),
    "h264_mov_rot180.mov": (3, 568, 320, 180, 0.10, False),
    "h264_mov_rot90.mov": (3, 320, 568, 90, 0.10, False),
    "h264_mov_unordered_50x50.mov": (4, 50, 50, 0, 0.12, False),
    "h264_mp4_1080p_vfr_skeleton.mp4": (72, 1920, 1080, 0, 2.57, False),
    "h264_mp4_corrupted_midstream.mp4": (49, 1280, 720, 0, 5.00, True),
    "h264_multistream_nasa.mp4": (325, 320, 180, 0, 13.00, False),
    "h264_rot90_352x288_phone.mp4": (23, 288, 352, 270, 0.77, False),
    "h264_truncated_audio.mp4": (280, 640, 360, 0, 11.20, False),
    "hevc_1080p_rot90_metadata_track.mp4": (3, 1080, 1920, 90, 0.10, False),
    "hevc_10bit_200x200.mp4": (30, 200, 200, 0, 1.00, False),
    "hevc_8bit_128x128.mp4": (10, 128, 128, 0, 1.00, False),
    "hevc_hdr10_1080p_vfr.mp4": (28, 1920, 1080, 0, 1.02, False),
    "hevc_ts_854x480.ts": (30, 854, 480, 0, 1.00, False),
    "mjpeg_mov_640x480.mov": (15, 640, 480, 0, 1.50, False),
    "mpeg1_mpg_320x240.mpg": (419, 320, 240, 0, 14.01, False),
    "mpeg4_avi_320x240_ucf_packedB.avi": (164, 320, 240, 0, 6.56, False),
    "mpeg4_avi_960x400_packed.avi": (96, 960, 400, 0, 4.09, False),
    "trunc_third_vp8.webm": (251, 1280, 720, 0, 10.46, True),
    "vp8_webm_720p_30s.webm": (720, 1280, 720, 0, 30.00, False),
    "vp9_10bit_profile2.webm": (72, 426, 240, 0, 3.00, False),
    "vp9_odd_161x121.webm": (30, 161, 121, 0, 1.00, False),
}

BROKEN: dict[str, type[VideoError]] = {
    "audio_only_mp3.mp3": NoVideoStream,
    "av1_64x64_one_frame.mp4": TooFewFrames,
    "h264_rot90_one_frame.mp4": TooFewFrames,
    "h264_sar_16_9_one_frame.mp4": TooFewFrames,
    "h264_zero_empty_stsc_broken.mp4": UndecodableVideo,
    "hevc_one_frame.mp4": TooFewFrames,
    "mkv_corrupt_unopenable.mkv": UndecodableVideo,
    "mp4_32bytes.mp4": NoVideoStream,
    "msmpeg4v2_avi_one_frame.avi": TooFewFrames,
    "opus_audio_only.mp4": NoVideoStream,
    "opus_audio_only_mkv.mkv": NoVideoStream,
    "vp9_encrypted_360bytes.webm": UndecodableVideo,
    "vp9_invalid_bitstream.webm": UndecodableVideo,
    "zero_length.mp4": EmptyFile,
}


def test_every_file_has_an_outcome() -> None:
    files = {path.name for path in VIDEOS.iterdir() if path.suffix != ".tsv"}
    assert files == SOUND.keys() | BROKEN.keys()


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_give_true_facts(name: str) -> None:
    frames, width, height, rotation, duration, truncated = SOUND[name]
    clips = load_clips(VIDEOS / name, SEEN)
    assert (clips.facts.frames, clips.facts.rotation) == (frames, rotation)
    assert (clips.facts.width, clips.facts.height) == (width, height)
    assert clips.facts.duration_s == pytest.approx(duration, abs=0.01)
    assert clips.truncated is truncated


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_sound_files_give_the_reference_frames(
    name: str, only_sequential: Callable[[], None]
) -> None:
    clips = load_clips(VIDEOS / name, SEEN, views=2, crops=3)
    only_sequential()
    reference = load_clips(VIDEOS / name, SEEN, views=2, crops=3)
    assert np.array_equal(clips.frames, reference.frames)
    assert np.array_equal(clips.times, reference.times)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_typed_errors(name: str) -> None:
    with pytest.raises(BROKEN[name]) as caught:
        load_clips(VIDEOS / name, SEEN)
    assert str(VIDEOS.parent) not in str(caught.value)
