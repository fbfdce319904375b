from __future__ import annotations

import json

import pytest

from model.config import VARIANTS, ConfigError, ModelConfig, Preprocessing


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_survives_json(name: str) -> None:
    fields = json.loads(json.dumps(VARIANTS[name].to_dict()))
    assert ModelConfig.from_dict(fields) == VARIANTS[name]


def test_the_json_form_is_flat_and_holds_every_field() -> None:
    fields = ModelConfig().to_dict()
    assert "preprocessing" not in fields
    assert fields["num_frames"] == 8
    assert fields["embed_dim"] == 768


def test_unknown_keys_of_a_file_are_ignored_but_not_those_of_a_caller() -> None:
    assert ModelConfig.from_dict({"params": 1, "note": "x", "depth": 3}).depth == 3
    with pytest.raises(ConfigError, match=r"unknown fields \['dephth'\]"):
        ModelConfig().replace(dephth=3)


def test_replace_reaches_into_preprocessing() -> None:
    config = ModelConfig().replace(num_frames=16, depth=3)
    assert (config.num_frames, config.preprocessing.num_frames, config.depth) == (16, 16, 3)
    assert config.image_size == 224


@pytest.mark.parametrize("dim", [11, 13, 48, 76, 192])
def test_the_mlp_width_comes_back_from_the_ratio_it_makes(dim: int) -> None:
    for hidden in range(1, 4 * dim):
        config = ModelConfig(embed_dim=dim, num_heads=1, mlp_ratio=hidden / dim)
        assert config.mlp_dim == hidden


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_type": "diagonal"}, "attention_type is 'diagonal'"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": True}, "depth is True"),
        ({"depth": 1.5}, "depth is 1.5"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"num_frames": "8"}, "num_frames is '8'"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"image_size": 0}, "image_size is 0"),
        ({"num_heads": 7}, "embed_dim 768 is not a multiple of num_heads 7"),
        ({"image_size": 230}, "image_size 230 is not a multiple of patch_size 16"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate is -0.1"),
        ({"sampling": "random"}, "sampling is 'random'"),
        ({"mean": [0.5]}, "mean is .* three numbers"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"std": [0.2, 0.2, "x"]}, "std is"),
        ({"std": [0.2, 0.2, 0.0]}, "every channel must be above 0"),
        ({"attention_type": "sparse_local_global", "num_frames": 7}, "must be even"),
        ({"attention_type": "sparse_local_global", "image_size": 240}, r"grid side \(15\)"),
    ],
)
def test_a_config_of_no_model_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(fields)


def test_preprocessing_is_checked_when_made_directly() -> None:
    with pytest.raises(ConfigError, match="num_frames is 0"):
        Preprocessing(num_frames=0)
