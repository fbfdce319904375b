"""Every shared file, sound and broken, posted to the running service: the table of outcomes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

# What a sound file turns out to be: width, height as displayed, sampling mode.
SOUND: dict[str, tuple[int, int, str]] = {
    "av1_hdr10_10bit_1080p.mp4": (1920, 1080, "dense"),
    "av1_mp4_1080x720.mp4": (1080, 720, "dense"),
    "flv1_flv_268x156.flv": (268, 156, "uniform"),
    "h264_4k60_rot90_portrait.mp4": (2160, 3840, "uniform"),
    "h264_avi_1080p_ntu.avi": (1920, 1080, "dense"),
    "h264_bikes_640x272_scenecuts.mp4": (640, 272, "dense"),
    "h264_carphone_176x144_sar.mp4": (193, 144, "dense"),
    "h264_chaplin_640x360.mp4": (640, 360, "dense"),
    "h264_flv_1080x720_fps1000.flv": (1080, 720, "dense"),
    "h264_fragmented.mp4": (1080, 720, "dense"),
    "h264_fullrange_720p.mp4": (1280, 720, "dense"),
    "h264_hlg_2x2.mp4": (2, 2, "uniform"),
    "h264_mdat_too_long.mp4": (1080, 720, "dense"),
    "h264_mkv_426x240_no_nbframes.mkv": (426, 240, "dense"),
    "h264_mov_rot0.mov": (568, 320, "uniform"),
    "h264_mov_rot180.mov": (568, 320, "uniform"),
    "h264_mov_rot90.mov": (320, 568, "uniform"),
    "h264_mov_unordered_50x50.mov": (50, 50, "uniform"),
    "h264_mp4_1080p_vfr_skeleton.mp4": (1920, 1080, "dense"),
    "h264_multistream_nasa.mp4": (320, 180, "dense"),
    "h264_rot90_352x288_phone.mp4": (288, 352, "uniform"),
    "h264_truncated_audio.mp4": (640, 360, "dense"),
    "hevc_1080p_rot90_metadata_track.mp4": (1080, 1920, "uniform"),
    "hevc_10bit_200x200.mp4": (200, 200, "dense"),
    "hevc_8bit_128x128.mp4": (128, 128, "dense"),
    "hevc_hdr10_1080p_vfr.mp4": (1920, 1080, "dense"),
    "hevc_ts_854x480.ts": (854, 480, "dense"),
    "mjpeg_mov_640x480.mov": (640, 480, "dense"),
    "mpeg1_mpg_320x240.mpg": (320, 240, "dense"),
    "mpeg4_avi_320x240_ucf_packedB.avi": (320, 240, "dense"),
    "mpeg4_avi_960x400_packed.avi": (960, 400, "dense"),
    "vp8_webm_720p_30s.webm": (1280, 720, "dense"),
    "vp9_10bit_profile2.webm": (426, 240, "dense"),
    "vp9_odd_161x121.webm": (161, 121, "dense"),
}

# Damaged, but with frames enough: the answer says that they are truncated.
TRUNCATED: dict[str, tuple[int, int, str]] = {
    "h264_mkv_truncated_claims_1132s.mkv": (720, 404, "dense"),
    "h264_mp4_corrupted_midstream.mp4": (1280, 720, "dense"),
    "trunc_third_vp8.webm": (1280, 720, "dense"),
}

REFUSED: dict[str, tuple[int, str]] = {
    "audio_only_mp3.mp3": (422, "no_video_stream"),
    "av1_64x64_one_frame.mp4": (422, "too_few_frames"),
    "h264_rot90_one_frame.mp4": (422, "too_few_frames"),
    "h264_sar_16_9_one_frame.mp4": (422, "too_few_frames"),
    "h264_zero_empty_stsc_broken.mp4": (422, "undecodable_video"),
    "hevc_one_frame.mp4": (422, "too_few_frames"),
    "mkv_corrupt_unopenable.mkv": (422, "undecodable_video"),
    "mp4_32bytes.mp4": (422, "no_video_stream"),
    "msmpeg4v2_avi_one_frame.avi": (422, "too_few_frames"),
    "opus_audio_only.mp4": (422, "no_video_stream"),
    "opus_audio_only_mkv.mkv": (422, "no_video_stream"),
    "vp9_encrypted_360bytes.webm": (422, "undecodable_video"),
    "vp9_invalid_bitstream.webm": (422, "undecodable_video"),
    "zero_length.mp4": (422, "empty_file"),
}


def post(service: Any, path: Path) -> httpx.Response:
    with path.open("rb") as file:
        return service.client.post("/v1/classify", files={"file": file})


def test_the_table_has_every_file(shared_videos: Path) -> None:
    files = {path.name for path in shared_videos.iterdir()} - {"manifest.tsv"}
    assert files == SOUND.keys() | TRUNCATED.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", [*SOUND, *TRUNCATED])
def test_a_usable_file_gets_labels(service: Any, shared_videos: Path, name: str) -> None:
    response = post(service, shared_videos / name)
    assert response.status_code == 200, response.text
    answer = response.json()
    width, height, mode = {**SOUND, **TRUNCATED}[name]
    assert (answer["video"]["width"], answer["video"]["height"]) == (width, height)
    assert answer["sampling"]["mode"] == mode
    assert answer["video"]["truncated"] is (name in TRUNCATED)
    assert len(answer["predictions"]) == 5
    assert 0 < sum(prediction["score"] for prediction in answer["predictions"]) <= 1.0001
    (times,) = answer["sampling"]["times_s"]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= answer["video"]["duration_s"]


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_file_is_refused_with_its_code(
    service: Any, shared_videos: Path, name: str
) -> None:
    response = post(service, shared_videos / name)
    status, code = REFUSED[name]
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def test_no_file_has_cost_a_worker(service: Any, shared_videos: Path) -> None:
    metrics = service.client.get("/metrics").text
    restarts = re.findall(r"^timesformer_decoder_restarts_total\{.*\} (.+)$", metrics, re.MULTILINE)
    assert restarts
    assert {float(count) for count in restarts} == {0.0}
