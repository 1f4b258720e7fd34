"""Mixing images and labels of a batch: Mixup, CutMix, TransMix, Patch Mixing.

Every image is mixed with its partner, the batch in reverse order, as timm does. TransMix (thesis chapter 4)
weighs the labels of CutMix by where the network's class token looks; on PS-ViT, whose tokens have moved, by
where they have moved to. Patch Mixing pastes random patches of a grid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vitkit.models.ps_vit import PSViT
from vitkit.runtimes.errors import BadRequest
from vitkit.torchvision_shim import timm
from vitkit.train.config import TrainConfig
from vitkit.train.seeds import seeded


class Mixed(NamedTuple):
    """A mixed batch.

    `images` (B, 3, H, W); `share` (B,) how much of each image, by area or by blending, is its partner's;
    `box` (H, W) bool the pixels that CutMix pasted, the same for all images, None for other mixtures.
    """

    images: Tensor
    share: Tensor
    box: Tensor | None = None


class TokenAttention(NamedTuple):
    """How much the class token attends to each token, and the pixel that stands for the token.

    `weights` (B, L), at least 0; `points` (B, L, 2) or (1, L, 2) as (y, x) in image pixels.
    """

    weights: Tensor
    points: Tensor


def mix(images: Tensor, config: TrainConfig, generator: Generator) -> Mixed:
    """Mix (B, 3, H, W) images by one of the config's methods, or by none.

    `mix_prob` of the batches are mixed; of these `patch_mix` by patches, and of the rest `switch_prob` by
    CutMix, the others by Mixup (by the one that has an alpha above 0 where the other has not).
    """
    mixed, patches, switch = torch.rand(3, generator=generator).tolist()
    if mixed >= config.mix_prob or len(images) < 2 or not wants_mixing(config):
        return Mixed(images, torch.zeros(len(images), device=images.device))
    if patches < config.patch_mix or not (config.mixup or config.cutmix):
        return patch_mix(images, config, generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    if config.cutmix and (not config.mixup or switch < config.switch_prob):
        return cutmix(images, config.cutmix, rng)
    return mixup(images, config.mixup, rng)


def wants_mixing(config: TrainConfig) -> bool:
    """Does the config mix images at all?"""
    return bool(config.mix_prob and (config.mixup or config.cutmix or config.patch_mix))


def mixup(images: Tensor, alpha: float, rng: np.random.Generator) -> Mixed:
    """Blend whole images; the share is of a Beta(alpha, alpha) distribution (Mixup)."""
    share = rng.beta(alpha, alpha)
    return Mixed(images.lerp(images.flip(0), share), torch.full((len(images),), share, device=images.device))


def cutmix(images: Tensor, alpha: float, rng: np.random.Generator) -> Mixed:
    """Paste one box of the partner, of a share of Beta(alpha, alpha) unless the border cuts it (CutMix)."""
    height, width = images.shape[2:]
    # timm draws the place from numpy's global generator.
    with seeded(int(rng.integers(2**32))):
        (top, bottom, left, right), own = timm.data.mixup.cutmix_bbox_and_lam(
            images.shape, rng.beta(alpha, alpha), correct_lam=True
        )
    box = torch.zeros(height, width, dtype=torch.bool, device=images.device)
    box[top:bottom, left:right] = True
    share = torch.full((len(images),), float(1 - own), device=images.device)
    return Mixed(torch.where(box, images.flip(0), images), share, box)


def patch_mix(images: Tensor, config: TrainConfig, generator: Generator) -> Mixed:
    """Paste N1 = round(r N) of the N patches of a grid, others for each image (Patch Mixing).

    r is uniform between `patch_min` and `patch_max`. The page that describes it leaves the grid, the
    distribution of r and the partner open; these are ours.
    """
    batch, count = len(images), config.patch_grid**2
    low, high = config.patch_min, config.patch_max
    ratio = low + (high - low) * torch.rand(batch, generator=generator)
    chosen = (ratio * count).round()
    rank = torch.rand(batch, count, generator=generator).argsort(1).argsort(1)
    grid = (rank < chosen.unsqueeze(1)).reshape(batch, 1, config.patch_grid, config.patch_grid)
    mask = F.interpolate(grid.float().to(images.device), images.shape[2:], mode="nearest").bool()
    return Mixed(torch.where(mask, images.flip(0), images), (chosen / count).to(images.device))


def soft_targets(targets: Tensor, classes: int, share: Tensor, smoothing: float) -> Tensor:
    """(B,) class numbers and the partners' shares (B,) -> (B, classes) smoothed, mixed labels."""
    own = 1 - share.unsqueeze(1)
    return timm.data.mixup.mixup_target(targets, classes, own, smoothing)  # type: ignore[no-any-return]


def attended_share(attention: TokenAttention, box: Tensor) -> Tensor:
    """The share (B,) of the class token's attention that falls into a box (H, W).

    Each token's attention is spread over the four pixels around its point with bilinear weights, and the
    pixels inside the box are summed; which is the attention times the box, sampled at the points. What
    falls outside the image is left out. 0 where no attention is left.
    """
    height, width = box.shape
    size = torch.tensor([height - 1, width - 1], dtype=torch.float32, device=box.device).clamp(min=1)
    where = (attention.points.float() * (2 / size) - 1).flip(-1).unsqueeze(1)
    both = torch.stack([box.float(), torch.ones_like(box, dtype=torch.float32)]).unsqueeze(0)
    # One map serves the batch, so that the points of all images form one list.
    inside, image = F.grid_sample(
        both, where.reshape(1, 1, -1, 2), mode="bilinear", padding_mode="zeros", align_corners=True
    ).reshape(2, *attention.points.shape[:2])
    weights = attention.weights.float()
    total = (weights * image).sum(1)
    return torch.where(total > 0, (weights * inside).sum(1) / total.clamp(min=1e-30), 0.0)


def transmix_share(mixed: Mixed, attention: TokenAttention) -> Tensor:
    """TransMix' label weight of the partner (B,): the mean of the shares of area and of attention.

    Only for CutMix; other mixtures keep their share.
    """
    if mixed.box is None:
        return mixed.share
    return (mixed.share + attended_share(attention, mixed.box)) / 2


class AttentionWatch:
    """Catches the class attention of a PS-ViT's last block, or of a timm ViT's, whenever it runs.

    Nothing is computed twice but one row of the attention; the network and its gradients stay as they are.
    Raises BadRequest for a network without a class token that attends to all tokens.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks = getattr(network, "encoder" if isinstance(network, PSViT) else "blocks", None)
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
            raise BadRequest(
                f"TransMix needs a class token; {type(network).__name__} shows no blocks with one"
            )
        self.network = network
        last: Any = blocks[-1]
        self.attention: Any = last.attn
        if not isinstance(network, PSViT) and getattr(network, "num_prefix_tokens", 0) != 1:
            raise BadRequest(f"TransMix needs one class token; {type(network).__name__} has another number")
        self.qkv: Tensor | None = None
        self.points: Tensor | None = None
        # For good: a compiled network does not see hooks that come and go.
        self.attention.qkv.register_forward_hook(self._keep_qkv)
        if isinstance(network, PSViT):
            network.sampler.register_forward_hook(self._keep_points)

    def _keep_qkv(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.qkv = output.detach()

    def _keep_points(self, module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        self.points = output[1].detach()[:, -1]

    @torch.no_grad()
    def attended(self, batch: int) -> TokenAttention:
        """The class token's attention in the last pass: softmax of the last block, mean over heads."""
        assert self.qkv is not None, "the network has not run"
        heads = self.attention.heads if isinstance(self.network, PSViT) else self.attention.num_heads
        query, key, _ = self.qkv.float().reshape(batch, -1, self.qkv.shape[-1]).chunk(3, dim=-1)
        query, key = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (query, key))
        # Some ViTs normalise them per head.
        query, key = (
            getattr(self.attention, norm, nn.Identity())(part)
            for norm, part in (("q_norm", query), ("k_norm", key))
        )
        logits = query[:, :, :1] @ key.transpose(2, 3) * self.attention.scale
        weights = logits.softmax(-1).mean(1)[:, 0, 1:]
        return TokenAttention(weights, self._points(weights))

    def _points(self, weights: Tensor) -> Tensor:
        if self.points is not None:
            return self.points.float() * self.network.config.stride  # type: ignore[union-attr,operator]
        # The published code scales the box down to the patches by taking their first pixels.
        side = self.network.patch_embed.patch_size[0]  # type: ignore[union-attr,index]
        count = round(weights.shape[1] ** 0.5)
        steps = torch.arange(count, device=weights.device) * side
        return torch.cartesian_prod(steps, steps).unsqueeze(0)
