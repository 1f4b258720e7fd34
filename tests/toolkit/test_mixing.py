from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vitkit.models import build
from vitkit.runtimes.errors import BadRequest
from vitkit.torchvision_shim import timm
from vitkit.train import TrainConfig
from vitkit.train.mixing import (
    AttentionWatch,
    Mixed,
    TokenAttention,
    attended_share,
    cutmix,
    mix,
    mixup,
    patch_mix,
    soft_targets,
    transmix_share,
)

PLAIN = TrainConfig(model="ps_vit_nano", label_smoothing=0.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coloured(count: int, side: int = 28) -> torch.Tensor:
    """Image i is i everywhere, so that a mixture tells where each pixel came from."""
    return torch.arange(count).float().reshape(-1, 1, 1, 1).expand(-1, 3, side, side).contiguous()


def splat(attention: TokenAttention, height: int, width: int) -> np.ndarray:
    """Each token's attention onto the four pixels around its point, written as loops (one image)."""
    canvas = np.zeros((height, width))
    for weight, (y, x) in zip(attention.weights[0].tolist(), attention.points[0].tolist(), strict=True):
        top, left = int(np.floor(y)), int(np.floor(x))
        for row, share_y in ((top, 1 - (y - top)), (top + 1, y - top)):
            for column, share_x in ((left, 1 - (x - left)), (left + 1, x - left)):
                if 0 <= row < height and 0 <= column < width:
                    canvas[row, column] += weight * share_y * share_x
    return canvas


def test_points_by_hand_give_the_attention_inside_the_box():
    box = torch.zeros(8, 10, dtype=torch.bool)
    box[2:5, 3:7] = True
    # Inside; outside; half way over the top edge; a quarter inside at a corner; outside the image.
    points = torch.tensor([[[3.0, 4.0], [0.0, 0.0], [1.5, 5.0], [4.5, 6.5], [-3.0, 4.0]]])
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.5]])
    share = attended_share(TokenAttention(weights, points), box)
    assert share.item() == pytest.approx(0.4 + 0.2 / 2 + 0.1 / 4)
    far = TokenAttention(weights[:, -1:], points[:, -1:])
    assert attended_share(far, box).item() == 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_the_share_is_that_of_a_splatted_map(seed):
    draw = np.random.default_rng(seed)
    height, width, tokens = *draw.integers(2, 12, 2), int(draw.integers(1, 6))
    points = draw.uniform(-2, (height + 1, width + 1), (1, tokens, 2))
    attention = TokenAttention(
        torch.from_numpy(draw.uniform(0.1, 1, (1, tokens))).float(), torch.from_numpy(points).float()
    )
    box = draw.random((height, width)) < 0.5
    canvas = splat(attention, height, width)
    expected = (canvas * box).sum() / canvas.sum() if canvas.sum() > 1e-3 else None
    share = attended_share(attention, torch.from_numpy(box)).item()
    if expected is not None:
        assert share == pytest.approx(expected, abs=1e-4)


def test_each_image_has_its_own_points_and_a_shared_grid_serves_all():
    box = torch.zeros(6, 6, dtype=torch.bool)
    box[:3] = True
    weights = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    points = torch.tensor([[[0.0, 0.0], [5.0, 5.0]], [[5.0, 0.0], [0.0, 5.0]]])
    assert attended_share(TokenAttention(weights, points), box).tolist() == [0.25, 0.75]
    assert attended_share(TokenAttention(weights, points[:1]), box).tolist() == [0.25, 0.25]


def test_cutmix_pastes_one_box_and_counts_it():
    images, draw = coloured(4), np.random.default_rng(1)
    for _ in range(20):
        mixed = cutmix(images, 1.0, draw)
        foreign = mixed.images[:, 0] != images[:, 0]
        assert torch.equal(foreign, mixed.box.expand_as(foreign))
        assert mixed.share.tolist() == pytest.approx([mixed.box.float().mean().item()] * 4)
        rows, columns = mixed.box.any(1).sum(), mixed.box.any(0).sum()
        assert mixed.box.sum() == rows * columns
        assert torch.equal(
            mixed.images[foreign.unsqueeze(1).expand_as(images)].unique(), torch.arange(4.0)
        ) or (not foreign.any())


def test_cutmix_leaves_numpys_own_numbers_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    cutmix(coloured(2), 1.0, np.random.default_rng(0))
    assert np.random.random() == expected


def test_mixup_blends_by_the_share():
    mixed = mixup(coloured(3), 0.8, np.random.default_rng(0))
    share = mixed.share[0].item()
    assert 0 < share < 1
    expected = [i * (1 - share) + (2 - i) * share for i in range(3)]
    assert mixed.images[:, 0, 5, 5].tolist() == pytest.approx(expected)
    assert mixed.box is None


@pytest.mark.parametrize(("grid", "side"), [(7, 28), (14, 28), (7, 32)])
def test_patch_mixing_pastes_whole_patches_in_the_drawn_number(grid, side):
    config = replace(PLAIN, patch_mix=1.0, patch_grid=grid, patch_min=0.2, patch_max=0.6)
    images = coloured(6, side)
    mixed = patch_mix(images, config, rng())
    foreign = (mixed.images != images)[:, 0]
    starts = [int(np.ceil(i * side / grid)) for i in range(grid + 1)]
    for i in range(6):
        cells = [
            foreign[i, starts[y] : starts[y + 1], starts[x] : starts[x + 1]]
            for y in range(grid)
            for x in range(grid)
        ]
        assert all(cell.all() or not cell.any() for cell in cells)
        pasted = sum(bool(cell.any()) for cell in cells)
        assert mixed.share[i].item() == pytest.approx(pasted / grid**2)
        assert 0.2 - 0.5 / grid**2 <= pasted / grid**2 <= 0.6 + 0.5 / grid**2
    assert len({tuple(mask.flatten().tolist()) for mask in foreign}) == 6


def test_soft_targets_mix_smoothed_labels():
    share = torch.tensor([0.25, 0.5, 1.0])
    given = soft_targets(torch.tensor([0, 1, 2]), 4, share, 0.1)
    off, on = 0.1 / 4, 0.9 + 0.1 / 4
    assert given[0].tolist() == pytest.approx([0.75 * on + 0.25 * off, off, 0.25 * on + 0.75 * off, off])
    assert given[1].tolist() == pytest.approx([off, on, off, off])
    assert given[2].tolist() == pytest.approx([on, off, off, off])
    logits = torch.randn(3, 4, generator=rng())
    plain = F.cross_entropy(logits, torch.tensor([0, 1, 2]), label_smoothing=0.1)
    none = soft_targets(torch.tensor([0, 1, 2]), 4, torch.zeros(3), 0.1)
    assert F.cross_entropy(logits, none).item() == pytest.approx(plain.item(), rel=1e-6)


def test_methods_are_drawn_in_the_wanted_shares():
    config = replace(
        PLAIN, mix_prob=0.8, mixup=0.8, cutmix=1.0, switch_prob=0.75, patch_mix=0.5, patch_grid=7
    )
    images, draw = coloured(2), rng(5)
    counts = {"none": 0, "patches": 0, "cutmix": 0, "mixup": 0}
    for _ in range(600):
        mixed = mix(images, config, draw)
        if torch.equal(mixed.images, images) and mixed.box is None:
            counts["none"] += 1
        elif mixed.box is not None:
            counts["cutmix"] += 1
        elif set(mixed.images.unique().tolist()) <= {0.0, 1.0}:
            counts["patches"] += 1
        else:
            counts["mixup"] += 1
    for name, expected in {"none": 0.2, "patches": 0.4, "cutmix": 0.3, "mixup": 0.1}.items():
        assert counts[name] / 600 == pytest.approx(expected, abs=0.06), counts


def test_the_watched_attention_is_the_networks_own_and_training_is_untouched():
    network = build("ps_vit_nano", dropout=0.0).train()
    torch.nn.init.normal_(network.sampler.offset_layers[0].weight, std=0.3)
    images = torch.randn(4, 3, 64, 64, generator=rng())
    inputs = []
    network.encoder[-1].attn.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    torch.manual_seed(0)
    plain = network(images)
    watch = AttentionWatch(network)
    torch.manual_seed(0)
    watched = network(images)
    assert torch.allclose(plain, watched)
    attention = watch.attended(4)
    attn = network.encoder[-1].attn
    q, k, _ = attn.qkv(inputs[-1]).reshape(4, 50, 3, 2, 32).unbind(2)
    expected = torch.einsum("bhd,blhd->bhl", q[:, 0], k).mul(attn.scale).softmax(-1).mean(1)[:, 1:]
    assert torch.allclose(attention.weights, expected, atol=1e-6)
    points = network.deploy(images)[1][:, -1]
    assert torch.allclose(attention.points, points, atol=1e-4)
    assert attention.points[0].std() > 0


def test_a_compiled_network_is_watched_in_every_pass():
    network = build("ps_vit_nano", iterations=2, encoder_layers=1).train()
    torch.nn.init.normal_(network.sampler.offset_layers[0].weight, std=0.3)
    watch = AttentionWatch(network)
    passes = torch.randn(3, 2, 3, 64, 64, generator=rng())
    plain = [(network(images), watch.attended(2))[1] for images in passes]
    network.compile(backend="eager")
    for images, expected in zip(passes, plain, strict=True):
        network(images)
        found = watch.attended(2)
        assert torch.allclose(found.weights, expected.weights, atol=1e-6)
        assert torch.allclose(found.points, expected.points, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_timm_vit_is_watched_too(heads):
    """Against the attention map that timm computes itself; the box as the published code scales it."""
    network = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=heads, num_classes=5
    ).eval()
    block = network.blocks[-1].attn
    block.fused_attn = False
    maps = []
    block.attn_drop.register_forward_hook(lambda module, given, out: maps.append(given[0]))
    watch = AttentionWatch(network)
    network(torch.randn(2, 3, 32, 32, generator=rng()))
    attention = watch.attended(2)
    expected = maps[0].mean(1)[:, 0, 1:]
    assert torch.allclose(attention.weights, expected, atol=1e-6)
    box = torch.zeros(32, 32, dtype=torch.bool)
    box[5:20, 9:30] = True
    small = F.interpolate(box[None, None].float(), (4, 4), mode="nearest").flatten()
    share = transmix_share(Mixed(torch.zeros(2, 3, 32, 32), torch.full((2,), 0.3), box), attention)
    inside = (expected * small).sum(1) / expected.sum(1)
    assert share.tolist() == pytest.approx(((inside + 0.3) / 2).tolist())


def test_other_mixtures_keep_their_share_and_networks_without_class_token_are_refused():
    mixed = Mixed(torch.zeros(2, 3, 4, 4), torch.tensor([0.2, 0.3]))
    attention = TokenAttention(torch.ones(2, 1), torch.zeros(2, 1, 2))
    assert transmix_share(mixed, attention) is mixed.share
    with pytest.raises(BadRequest, match="class token"):
        AttentionWatch(timm.create_model("resnet18"))
    with pytest.raises(BadRequest, match="another number"):
        AttentionWatch(
            timm.models.VisionTransformer(
                img_size=32, embed_dim=8, num_heads=2, depth=1, class_token=False, global_pool="avg"
            )
        )
