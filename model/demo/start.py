"""How the demo network starts: as a bank of motion-energy detectors (Adelson and Bergen, 1985).

With random weights a small transformer needs some hundred thousand clips before it notices that
anything moves. So its first block begins as what is known to see motion, and training takes it
from there:

    patch embedding      lower half of the width: Gabor filters in pairs of sine and cosine;
                         upper half: nothing of the picture, place and a code of the frame's time
    temporal attention   every frame asks for the one after it (by the code) and copies its
                         filters' answers to the upper half
    MLP                  for each pair, answers now and a frame later are added with their phases
                         shifted against each other; the energy of the sum tells direction
    later space attention  a head each looks to the left, the right, the top and the bottom: what
                         moves apart there approaches, what moves around turns
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from model.network.attention import PatchAttention
from model.network.timesformer import Block, TimeSformer

SIDE_GAIN = 2.5  # squared, and over sqrt(head_dim): how one-sided a later head starts
CYCLES = (0.5, 1.0, 1.75, 3.0)  # of the Gabor filters, per patch
CODE_NORM = 4.0  # of a frame's time code; the filters' answers have a norm of about 8
SIDE_NORM = 2.0  # of a patch's place at the rim, in either direction
CODE_GAIN = 2.5  # sharpness of the first attention: well above 0.9 on the frame asked for


@torch.no_grad()
def start_as_motion_energy(network: TimeSformer, clips: Tensor) -> None:
    """Initialises a network of any scheme in place; space-only attention gets the filters alone.

    Args:
        network: Of an even width, and heads of at least as many channels as it has frames, and
            where time and space are attended to together, rows and columns of patches.
        clips: uint8 (batch, time, height, width, 3), to set the scale of the filters by.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    _filters(network, clips)
    config = network.config
    code = torch.linalg.qr(torch.randn(*[config.embed_dim // 2] * 2))[0]
    times, sides = code[: config.num_frames], code[-2:]
    rows, columns = code[config.num_frames : -2].split(config.grid)[:2]
    places = Places(sides, rows, columns)
    _codes(network, times, places)
    if config.attention_type != "space_only":
        _look_ahead(network, times, places)
    _energies(network)
    _look_aside(network, sides)


class Places(NamedTuple):
    """Where a patch is: `sides` (2, half) grow downwards and to the right; `rows` and `columns`
    (grid, half) are all at right angles, for attentions that have to find one place in a frame."""

    sides: Tensor
    rows: Tensor
    columns: Tensor


def _filters(network: TimeSformer, clips: Tensor) -> None:
    """Gabor pairs of all directions and scales, each of variance 1 over the clips."""
    projection = network.patch_embed.proj
    size, half = projection.kernel_size[0], projection.out_channels // 2
    axis = (torch.arange(size) - (size - 1) / 2) / size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * 0.33**2))
    projection.weight.zero_()
    directions = math.ceil(half / 2 / len(CYCLES))
    for pair in range(half // 2):
        angle = math.pi * (pair // len(CYCLES)) / directions
        phase = math.cos(angle) * x + math.sin(angle) * y
        phase = 2 * math.pi * CYCLES[pair % len(CYCLES)] * phase
        for part, wave in enumerate((phase.cos(), phase.sin())):
            flat = (wave * window).sum() / window.sum()  # to be taken away: blind to brightness
            projection.weight[2 * pair + part] = (wave - flat) * window
    images = (clips.flatten(0, 1).float() / 255 - network.mean) / network.std
    answers = projection(images.permute(0, 3, 1, 2))[:, : half // 2 * 2]
    scale = answers.square().mean((0, 2, 3)).reshape(-1, 2).mean(1).sqrt()
    projection.weight[: len(scale) * 2] /= scale.repeat_interleave(2)[:, None, None, None]


def _sees_places(network: TimeSformer) -> bool:
    """Whether the attention over time is over places too, and has to tell them apart."""
    return network.config.attention_type in ("joint_space_time", "sparse_local_global")


def _codes(network: TimeSformer, times: Tensor, places: Places) -> None:
    """Says when and where a patch is, in the upper half of the width."""
    half, grid = network.config.embed_dim // 2, network.config.grid
    if network.config.attention_type != "space_only":
        network.time_embed.zero_()
        network.time_embed[0, :, half:] = times * CODE_NORM
    axis = torch.linspace(-1, 1, grid)
    at = torch.cartesian_prod(axis, axis) @ places.sides * SIDE_NORM  # rows, then columns
    if _sees_places(network):
        at += (places.rows[:, None] + places.columns[None]).flatten(0, 1) * CODE_NORM
    network.pos_embed.zero_()
    nn.init.normal_(network.pos_embed[..., half:], std=0.1)
    network.pos_embed[0, 1:, half:] += at


def _look_ahead(network: TimeSformer, times: Tensor, places: Places) -> None:
    """Half the heads of the first attention over time copy the same place in the next frame; in
    the last frame they copy it from there."""
    half = times.shape[1]
    dim, width = 2 * half, network.config.head_dim
    block = cast(Block, network.blocks[0])
    before = next(iter(block.before.values()), None)
    attention = block.attn if before is None else cast(PatchAttention, before).attn
    query, key, value = torch.split(attention.qkv.weight, dim)
    place = [places.rows, places.columns] if _sees_places(network) else []
    ask, answer = torch.cat([times, *place]), torch.cat([_next(times), *place])
    for head in range(half // width):
        rows = slice(head * width, (head + 1) * width)
        query[rows], key[rows], value[rows] = 0, 0, 0
        query[rows, half:][: len(ask)] = CODE_GAIN * ask
        key[rows, half:][: len(answer)] = CODE_GAIN * answer
        value[rows, rows] = torch.eye(width)
    attention.proj.weight *= 0.1
    attention.proj.weight[:, :half] = 0
    attention.proj.weight[half:, :half] = torch.eye(half)
    if before is not None:
        cast(PatchAttention, before).fc.weight.copy_(torch.eye(dim))
        block.attn.proj.weight *= 0.2  # space comes after the energies


def _next(times: Tensor) -> Tensor:
    """For each frame the code of the frame after it; for the last its own."""
    return times[torch.arange(len(times)).add(1).clamp(max=len(times) - 1)]


def _energies(network: TimeSformer) -> None:
    """Hidden units in fours of phase, the later answers a quarter ahead, behind, or in step."""
    mlp, half = cast(Block, network.blocks[0]).mlp, network.config.embed_dim // 2
    mlp.fc1.weight *= 0.1
    mlp.fc2.weight *= 0.5
    shifts = (math.pi / 2, -math.pi / 2, 0.0)
    units = [
        (pair, shift, turn * math.pi / 2)
        for pair in range(half // 2)
        for shift in shifts
        for turn in range(4)
    ]
    for hidden, (pair, shift, phase) in zip(mlp.fc1.weight, units, strict=False):
        now = torch.tensor([math.cos(phase), math.sin(phase)])
        later = torch.tensor([math.cos(phase + shift), math.sin(phase + shift)])
        hidden[2 * pair : 2 * pair + 2] += now
        hidden[half + 2 * pair : half + 2 * pair + 2] += later
    for column, (pair, shift, _) in zip(mlp.fc2.weight.T, units, strict=False):
        if shift:  # a quarter ahead less a quarter behind: which way
            column[half + 2 * pair] += math.copysign(0.5, shift)
        else:  # in step: how little
            column[half + 2 * pair + 1] += 0.3


def _look_aside(network: TimeSformer, sides: Tensor) -> None:
    """In later blocks the query is a constant and the key is y or x, up or down: head by head."""
    dim, width = network.config.embed_dim, network.config.head_dim
    directions = [sign * side for side in sides for sign in (1, -1)]
    for module in list(network.blocks)[1:]:
        attention = cast(Block, module).attn
        query, key, _ = torch.split(attention.qkv.weight, dim)
        for head, direction in zip(range(network.config.num_heads), directions, strict=False):
            row = head * width
            query[row], key[row] = 0, 0
            key[row, dim // 2 :] = direction * SIDE_GAIN
            attention.qkv.bias[row] = SIDE_GAIN
