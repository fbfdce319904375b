from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from model.config import ATTENTION_TYPES, AttentionType
from model.network.attention import Attention, PatchAttention, attend_with_class_token
from model.network.schemes import SCHEMES, Grouping
from model.network.timesformer import Block
from tests.model.conftest import random_model, tiny_config

TIME, HEIGHT, WIDTH, DIM = 4, 6, 8, 3
GROUPINGS = [Grouping(*rules) for rules in product(("all", "each", "halves", "stride"), repeat=3)]

Place = tuple[int, int, int]
# Whether two patches may attend to each other, said once more and without axes or factors.
TOGETHER: dict[tuple[AttentionType, str], Callable[[Place, Place], bool]] = {
    ("divided_space_time", "temporal"): lambda a, b: a[1:] == b[1:],
    ("divided_space_time", "main"): lambda a, b: a[0] == b[0],
    ("joint_space_time", "main"): lambda a, b: True,
    ("space_only", "main"): lambda a, b: a[0] == b[0],
    ("sparse_local_global", "local"): lambda a, b: (
        (a[1] < HEIGHT // 2) == (b[1] < HEIGHT // 2) and (a[2] < WIDTH // 2) == (b[2] < WIDTH // 2)
    ),
    ("sparse_local_global", "main"): lambda a, b: all(
        (i - j) % 2 == 0 for i, j in zip(a, b, strict=True)
    ),
    ("axial", "temporal"): lambda a, b: a[1:] == b[1:],
    ("axial", "width"): lambda a, b: a[:2] == b[:2],
    ("axial", "main"): lambda a, b: (a[0], a[2]) == (b[0], b[2]),
}


def _grouping(attention_type: AttentionType, name: str) -> Grouping:
    scheme = SCHEMES[attention_type]
    return scheme.main if name == "main" else scheme.before[name]


def _indices() -> Tensor:
    """Every patch holds its own number."""
    numbers = torch.arange(TIME * HEIGHT * WIDTH).reshape(1, TIME, HEIGHT, WIDTH, 1)
    return numbers.float().expand(2, -1, -1, -1, DIM)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_join_is_the_inverse_of_split(grouping: Grouping) -> None:
    patches = torch.randn(2, TIME, HEIGHT, WIDTH, DIM)
    groups = grouping.split(patches)
    assert groups.shape[1:3] == grouping.counts(TIME, HEIGHT, WIDTH)
    assert torch.equal(grouping.join(groups, patches.shape), patches)


@pytest.mark.parametrize(("attention_type", "name"), TOGETHER)
def test_groups_hold_exactly_the_patches_that_the_paper_names(
    attention_type: AttentionType, name: str
) -> None:
    groups = _grouping(attention_type, name).split(_indices())[0, :, :, 0].long()
    places = list(product(range(TIME), range(HEIGHT), range(WIDTH)))
    together = TOGETHER[attention_type, name]
    for group in groups.tolist():
        wanted = [index for index, place in enumerate(places) if together(places[group[0]], place)]
        assert sorted(group) == wanted


def test_every_attention_of_every_scheme_is_tested() -> None:
    attentions = {
        (key, name) for key, scheme in SCHEMES.items() for name in (*scheme.before, "main")
    }
    assert attentions == set(TOGETHER)


def test_attention_is_the_formula() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, num_heads=2), torch.randn(3, 5, 8)
    query, key, value = (
        part.reshape(3, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1)
    )
    weights = (query @ key.transpose(-2, -1) / 4**0.5).softmax(dim=-1)
    expected = attention.proj((weights @ value).transpose(1, 2).reshape(3, 5, 8))
    torch.testing.assert_close(attention(x), expected)


def test_attention_over_patches_adds_nothing_at_first() -> None:
    attention = random_model(tiny_config()).blocks[0].before["temporal"]  # type: ignore[index]
    assert isinstance(attention, PatchAttention)
    torch.nn.init.zeros_(attention.fc.weight)
    torch.nn.init.zeros_(attention.fc.bias)
    assert attention(torch.randn(1, 4, 4, 4, 24)).abs().max() == 0


def _influence(function: Callable[[Tensor], Tensor], patches: Tensor, place: Place) -> Tensor:
    """Which patches change when the one at `place` does, (time, height, width) bool."""
    changed = patches.clone()
    changed[0, *place] += torch.randn(patches.shape[-1])
    return ((function(changed) - function(patches)).abs() > 1e-7).any(dim=-1)[0]


@pytest.mark.parametrize(("attention_type", "name"), TOGETHER)
def test_a_patch_reaches_only_the_patches_it_may(attention_type: AttentionType, name: str) -> None:
    torch.manual_seed(1)
    grouping = _grouping(attention_type, name)
    patches, cls, place = torch.randn(1, TIME, HEIGHT, WIDTH, 8), torch.randn(1, 1, 8), (2, 3, 1)
    if name == "main":
        attention = Attention(8, num_heads=2)

        def run(x: Tensor) -> Tensor:
            return attend_with_class_token(attention, grouping, cls, x)[1]

    else:
        run = PatchAttention(8, num_heads=2, grouping=grouping)
        torch.nn.init.normal_(run.fc.weight)
    together = TOGETHER[attention_type, name]
    expected = torch.tensor(
        [together(place, other) for other in product(range(TIME), range(HEIGHT), range(WIDTH))]
    ).reshape(TIME, HEIGHT, WIDTH)
    with torch.no_grad():
        assert torch.equal(_influence(run, patches, place), expected)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_the_class_token_hears_every_patch_and_is_the_mean_of_its_copies(
    attention_type: AttentionType,
) -> None:
    torch.manual_seed(2)
    grouping, attention = SCHEMES[attention_type].main, Attention(8, num_heads=2)
    patches, cls = torch.randn(1, 4, 4, 4, 8, requires_grad=True), torch.randn(1, 1, 8)
    mixed, _ = attend_with_class_token(attention, grouping, cls, patches)
    copies = [
        attention(torch.cat([cls, group[None]], dim=1))[:, :1]
        for group in grouping.split(patches)[0]
    ]
    torch.testing.assert_close(mixed, torch.stack(copies).mean(dim=0))
    mixed.sum().backward()
    assert patches.grad is not None
    assert bool((patches.grad != 0).any(dim=-1).all())


def test_one_divided_block_reaches_the_cross_of_time_and_frame() -> None:
    """Time first, then space: a patch reaches its position in all frames, thence every patch; but
    space alone cannot leave its frame."""
    block = random_model(tiny_config()).blocks[0]
    assert isinstance(block, Block)
    cls, patches = torch.randn(1, 1, 24), torch.randn(1, 4, 4, 4, 24)
    with torch.no_grad():
        assert _influence(lambda x: block(cls, x)[1], patches, (1, 2, 3)).all()
        block.before.clear()
        frame = _influence(lambda x: block(cls, x)[1], patches, (1, 2, 3))
    assert frame[1].all()
    assert not frame[[0, 2, 3]].any()
