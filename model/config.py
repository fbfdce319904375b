"""What a TimeSformer is (`ModelConfig`), what it sees (`Preprocessing`), and the named variants.

Plain data without torch: serving reads the same two dataclasses from a bundle's manifest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

AttentionType = Literal[
    "divided_space_time",
    "joint_space_time",
    "space_only",
    "sparse_local_global",
    "axial",
]
ATTENTION_TYPES: tuple[AttentionType, ...] = get_args(AttentionType)

Sampling = Literal["dense", "uniform"]


class ConfigError(ValueError):
    """A configuration that describes no model; the message says which field and why."""


def _require_positive_int(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{field} is {value!r}; it must be a whole number above 0")


def _three_floats(field: str, value: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(channel) for channel in value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{field} is {value!r}; it must be three numbers, one a channel"
        ) from None
    return red, green, blue


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the model sees of a video. It travels with the weights, in the bundle's manifest.

    `dense` sampling takes `num_frames` frames, `frame_stride` apart on a 30 fps timeline, whatever
    the file's own frame rate; `uniform` cuts the video into `num_frames` segments, one frame each.
    `mean` and `std` are per RGB channel on a 0..1 scale and are applied inside the exported graph.
    """

    num_frames: int = 8
    image_size: int = 224
    sampling: Sampling = "dense"
    frame_stride: int = 32
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", _three_floats("mean", self.mean))
        object.__setattr__(self, "std", _three_floats("std", self.std))
        for field in ("num_frames", "image_size", "frame_stride"):
            _require_positive_int(field, getattr(self, field))
        if self.sampling not in get_args(Sampling):
            raise ConfigError(
                f"sampling is {self.sampling!r}; it must be one of {get_args(Sampling)}"
            )
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}; every channel must be above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of one TimeSformer. Default: the paper's (ViT-B/16, Kinetics-400)."""

    attention_type: AttentionType = "divided_space_time"
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 400
    drop_path_rate: float = 0.1
    preprocessing: Preprocessing = Preprocessing()

    def __post_init__(self) -> None:
        for field in ("patch_size", "embed_dim", "depth", "num_heads", "num_classes"):
            _require_positive_int(field, getattr(self, field))
        if self.attention_type not in ATTENTION_TYPES:
            raise ConfigError(
                f"attention_type is {self.attention_type!r}; it must be one of {ATTENTION_TYPES}"
            )
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ConfigError(f"drop_path_rate is {self.drop_path_rate}; it must be in [0, 1)")
        if self.attention_type == "sparse_local_global" and (self.grid % 2 or self.num_frames % 2):
            raise ConfigError(
                "sparse_local_global halves the patch grid and strides time by 2: "
                f"the grid side ({self.grid}) and num_frames ({self.num_frames}) must be even"
            )

    @property
    def num_frames(self) -> int:
        return self.preprocessing.num_frames

    @property
    def image_size(self) -> int:
        return self.preprocessing.image_size

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return round(self.embed_dim * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """One flat JSON object, the format of `--config FILE`; `from_dict` is its inverse."""
        fields = dataclasses.asdict(self)
        preprocessing = fields.pop("preprocessing")
        return {**fields, **preprocessing}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Reads the flat object. Unknown keys are ignored: foreign configs carry notes.

        Raises:
            ConfigError: a field has a value that no model can have.
        """
        return cls().replace(**{key: fields[key] for key in CONFIG_FIELDS if key in fields})

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, those of `preprocessing` included.

        Raises:
            ConfigError: an unknown field, or values that fit no model.
        """
        unknown = changes.keys() - CONFIG_FIELDS
        if unknown:
            raise ConfigError(
                f"unknown fields {sorted(unknown)}; known are {sorted(CONFIG_FIELDS)}"
            )
        seen = {key: value for key, value in changes.items() if key in _PREPROCESSING_FIELDS}
        rest = {key: value for key, value in changes.items() if key not in _PREPROCESSING_FIELDS}
        return dataclasses.replace(
            self, **rest, preprocessing=dataclasses.replace(self.preprocessing, **seen)
        )


_PREPROCESSING_FIELDS = frozenset(field.name for field in dataclasses.fields(Preprocessing))
CONFIG_FIELDS = _PREPROCESSING_FIELDS | {
    field.name for field in dataclasses.fields(ModelConfig) if field.name != "preprocessing"
}


def _variant(
    num_frames: int, image_size: int, frame_stride: int, **architecture: Any
) -> ModelConfig:
    return ModelConfig(
        preprocessing=Preprocessing(
            num_frames=num_frames, image_size=image_size, frame_stride=frame_stride
        ),
        **architecture,
    )


# Paper, table 5 (base, hr, large) and table 6 (long-video: clips of 8.5 s to 102 s).
VARIANTS: dict[str, ModelConfig] = {
    "base": _variant(8, 224, 32),
    "hr": _variant(16, 448, 16),
    "large": _variant(96, 224, 4),
    "long-8": _variant(8, 224, 32),
    "long-32": _variant(32, 224, 32),
    "long-64": _variant(64, 224, 32),
    "long-96": _variant(96, 224, 32),
    "small": _variant(8, 224, 32, embed_dim=384, num_heads=6),
    "tiny": _variant(8, 224, 32, embed_dim=192, num_heads=3),
    "demo": _variant(
        8, 64, 4, embed_dim=96, depth=3, num_heads=4, mlp_ratio=3.0, num_classes=12,
        drop_path_rate=0.0,
    ),
}  # fmt: skip
