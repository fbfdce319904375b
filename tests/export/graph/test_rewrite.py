"""The rewrites: each alone and all together give the network's answers, for every scheme."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from export.graph.rewrite import (
    REWRITES,
    ClassTokenAttention,
    InferenceTimeSformer,
    fold_normalisation,
    fold_norms,
    merge_projections,
    multiply_adds,
    rewrite,
    shorten_last_block,
)
from model.config import ATTENTION_TYPES, VARIANTS, ModelConfig
from model.network.cost import cost
from model.network.timesformer import TimeSformer
from tests.model.conftest import random_frames, tiny_config

Rewriting = Callable[[InferenceTimeSformer], None]
# Of logits around 1; float32 rounding alone is below 1e-5.
TOLERANCE = 1e-5


def wild_model(config: ModelConfig, seed: int = 0) -> TimeSformer:
    """No weight is zero or one, no two channels of the pixels are alike, attention is peaked."""
    config = config.replace(mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TimeSformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.5 if "qkv" in name or name.endswith("bias") else 0.2))
    return model


@pytest.fixture(scope="module", params=ATTENTION_TYPES)
def model(request: pytest.FixtureRequest) -> TimeSformer:
    return wild_model(tiny_config(request.param))


def assert_same_answers(network: nn.Module, model: TimeSformer, batch: int) -> None:
    frames = random_frames(model.config, batch=batch, seed=batch)
    with torch.inference_mode():
        expected, actual = model(frames), network(frames)
    assert expected[0].std() > 0.1  # else equality would say little
    for wanted, given in zip(expected, actual, strict=True):
        assert given.dtype == torch.float32
        torch.testing.assert_close(given, wanted, rtol=TOLERANCE, atol=TOLERANCE)


ALONE = {f"{each.__name__} alone": (each,) for each in REWRITES}
ALL_BUT = {
    f"all but {each.__name__}": tuple(other for other in REWRITES if other is not each)
    for each in REWRITES
}
SUBSETS = {"none": (), "all": REWRITES, **ALONE, **ALL_BUT}


@pytest.mark.parametrize("rewrites", SUBSETS.values(), ids=SUBSETS)
def test_rewrites_are_an_identity_at_any_batch_size(
    model: TimeSformer, rewrites: tuple[Rewriting, ...]
) -> None:
    network = rewrite(model, rewrites)
    for batch in (1, 3):
        assert_same_answers(network, model, batch)


@pytest.mark.parametrize("num_frames", [1, 3])
@pytest.mark.parametrize(
    "attention_type", [scheme for scheme in ATTENTION_TYPES if scheme != "sparse_local_global"]
)
def test_an_odd_number_of_frames_and_a_single_one(attention_type: str, num_frames: int) -> None:
    model = wild_model(tiny_config(attention_type, num_frames=num_frames))
    assert_same_answers(rewrite(model), model, batch=2)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_a_network_of_one_block_and_another_mlp_ratio(attention_type: str) -> None:
    model = wild_model(tiny_config(attention_type, depth=1, mlp_ratio=2.5))
    assert_same_answers(rewrite(model), model, batch=2)


def test_folding_rounds_once() -> None:
    """What cancels after folding must not have been rounded before: biases of 1e4 and their
    opposite in the next linear. The float32 original itself is off by 1e-3 here."""
    model = wild_model(tiny_config())
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.bias += 1e4 * torch.linspace(0.1, 1, len(norm.bias))
                linear.bias.copy_(
                    linear.bias.double() - linear.weight.double() @ norm.bias.double()
                )
    frames = random_frames(model.config)
    with torch.inference_mode():
        actual = rewrite(model)(frames)[0]
        expected = copy.deepcopy(model).double()(frames)[0]
    # The linear's own bias is of float32: what it lacks is in both.
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_original_stays_as_it_is(model: TimeSformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = rewrite(model)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class TestWhatIsLeft:
    """The identities hold because the work is gone, not because nothing was done."""

    def test_no_norm_but_the_last_has_weights(self, model: TimeSformer) -> None:
        network = rewrite(model)
        norms = {
            name: layer.elementwise_affine
            for name, layer in network.named_modules()
            if isinstance(layer, nn.LayerNorm)
        }
        assert norms.pop("norm")
        assert norms
        assert not any(norms.values())

    def test_no_key_or_value_has_a_bias_and_no_score_a_scale(self, model: TimeSformer) -> None:
        network = rewrite(model)
        for name, layer in network.named_modules():
            if name.endswith((".key", ".value")):
                assert isinstance(layer, nn.Linear)
                assert layer.bias is None
            assert getattr(layer, "scale", 1.0) == 1.0

    def test_an_attention_before_the_main_one_ends_in_one_linear(self, model: TimeSformer) -> None:
        assert not [name for name, _ in rewrite(model).named_parameters() if ".fc." in name]

    def test_the_last_block_projects_no_keys_and_values(self, model: TimeSformer) -> None:
        last = rewrite(model).blocks[-1].main
        assert isinstance(last, ClassTokenAttention)
        assert not [name for name, _ in last.named_modules() if name in ("key", "value")]

    def test_pixels_are_only_cast(self, model: TimeSformer) -> None:
        assert isinstance(rewrite(model).pixels, nn.Identity)


class TestMultiplyAdds:
    def test_of_base_before_and_after(self) -> None:
        with torch.device("meta"):
            network = InferenceTimeSformer(TimeSformer(VARIANTS["base"]))
        with torch.no_grad():
            for apply in REWRITES:
                apply(network)
        assert round(cost(VARIANTS["base"]).multiply_adds / 1e9, 1) == 195.8
        assert round(multiply_adds(network) / 1e9, 1) == 173.1

    def test_are_those_of_a_real_run(self, model: TimeSformer) -> None:
        network, counter = rewrite(model), FlopCounterMode(display=False)
        with torch.inference_mode(), counter:
            network(random_frames(model.config, batch=1))
        assert 2 * multiply_adds(network) == counter.get_total_flops()

    @pytest.mark.parametrize("rewriting", [merge_projections, shorten_last_block])
    def test_fall_with_every_rewrite_that_is_about_them(self, rewriting: Rewriting) -> None:
        model = wild_model(tiny_config())
        assert multiply_adds(rewrite(model, [rewriting])) < multiply_adds(rewrite(model, []))


@pytest.mark.parametrize(
    ("twice", "reason"),
    [
        (fold_normalisation, "normalisation has been folded already"),
        (merge_projections, "projections have been merged already"),
        (shorten_last_block, "last block has been shortened already"),
    ],
)
def test_what_would_be_wrong_done_twice_is_refused(twice: Rewriting, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rewrite(wild_model(tiny_config()), [twice, twice])


def test_norms_may_be_folded_before_or_after_the_normalisation() -> None:
    model = wild_model(tiny_config())
    assert_same_answers(rewrite(model, [fold_norms, fold_normalisation]), model, batch=1)
