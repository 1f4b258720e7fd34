"""Matching and losses of kMaX-DeepLab and ReMaX, each piece a function of tensors.

kMaX-DeepLab's losses are the ones of the authors' public code (deeplab2 and its PyTorch port);
ReMask, ReClass and the sigmoid mask-ID loss are of the thesis, chapter 6, equations 6.1 to 6.4.
B is the batch, N the slots (mask queries), K the classes, S the most segments of an image, D the width of
a pixel feature, h x w the size of the final mask logits, at which the ground truth is given too. Each loss
is averaged within an image first and then over the images; an image without any labelled pixel adds zero.
Everything is computed in float32 or more, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, wraps
from typing import Any, Literal, ParamSpec, TypeVar, cast

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor
from torch.nn import functional as F

from vitkit.models.kmax import Prediction
from vitkit.runtimes.errors import BadRequest

Activation = Literal["sigmoid", "softmax"]

# The three constants of the authors' code that results depend on.
_DICE_EPSILON = 1e-5
_LEAST_WEIGHT = 1e-5
_VOID_LOGIT = -99999.0

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch.

    `masks` (B, S, h, w) bool holds one segment each, which do not overlap, and nothing where padded;
    `classes` (B, S) int64 their classes, -1 where padded; `semantic` (B, h, w) int64 the class of each
    pixel, -1 where it has none. A crowd region has no mask, but may have a class there. A segment that has
    lost all its pixels to sub-sampling counts as padded.
    """

    masks: Tensor
    classes: Tensor
    semantic: Tensor

    @cached_property
    def segments(self) -> Tensor:
        """(B, h, w) int64: the number of the segment that covers the pixel, -1 on void."""
        count = self.masks.shape[1]
        numbers = torch.arange(1, count + 1, dtype=torch.int32, device=self.masks.device)
        # One plane of zeros before them, so that there is a maximum also where there are no segments.
        planes = F.pad(self.masks * numbers[:, None, None], (0, 0, 0, 0, 1, 0))
        return planes.amax(1).long() - 1

    @cached_property
    def areas(self) -> Tensor:
        """(B, S) float32: the number of pixels of each segment."""
        return self.masks.flatten(2).sum(-1).float()

    @property
    def void(self) -> Tensor:
        """(B, h, w) bool: no mask covers the pixel."""
        return self.segments < 0

    @property
    def present(self) -> Tensor:
        """(B, S) bool: the segment is not padding."""
        return (self.classes >= 0) & (self.areas > 0)


@dataclass(frozen=True)
class Matching:
    """Which slot answers for which segment, and the constant weights that follow from it.

    `slots` (B, S) int64 is the slot of each segment, -1 where it is padded or has none. `dice_weights`
    (B, S) weigh the segments in the dice term: the slot's probability of the right class, at least 1e-5,
    and zero without a slot. `class_weights` (B, N) weigh the slots in the class term: the mask similarity
    where matched, elsewhere the part of the slot's mask that lies on void, both at least 1e-5.
    """

    slots: Tensor
    dice_weights: Tensor
    class_weights: Tensor


@dataclass(frozen=True)
class LossConfig:
    """Weights and settings of `panoptic_losses`; the defaults are ReMaX's for COCO.

    `pq_weight` is of the class term, `relaxed_semantic_weight` of the semantic loss of each ReMask head.
    `positive_weight` is for matched slots, the rest for void ones. `mask_id` is the activation of the
    mask-ID loss, and with it of ReMask and ReClass. `reclass_eta` is the part of a label that comes from
    overlaps. `*_samples` pixels are drawn, and the higher `*_temperature`, the more of small segments;
    `semantic_samples` 0 takes all pixels. `similarity_temperature` divides the similarities of pixel
    features. `semantic_hardest` is the part of the pixels, those with the largest loss, that the semantic
    loss keeps.

    kMaX-DeepLab is `mask_id="softmax", reclass_eta=0`. It takes 1024 samples in both on ADE20K; on
    Cityscapes `instance_temperature=0.6, semantic_samples=0, semantic_hardest=0.2`. Raises BadRequest for
    a value out of range.
    """

    pq_weight: float = 3.0
    dice_weight: float = 3.0
    mask_id_weight: float = 0.3
    instance_weight: float = 1.0
    semantic_weight: float = 1.0
    relaxed_semantic_weight: float = 0.5
    positive_weight: float = 0.75
    mask_id: Activation = "sigmoid"
    reclass_eta: float = 0.1
    instance_samples: int = 4096
    instance_temperature: float = 1.5
    similarity_temperature: float = 0.3
    semantic_samples: int = 4096
    semantic_temperature: float = 2.0
    semantic_hardest: float = 1.0

    def __post_init__(self) -> None:
        limits = {
            "positive_weight": (0, 1),
            "reclass_eta": (0, 1),
            "instance_samples": (1, math.inf),
            "similarity_temperature": (1e-3, math.inf),
            "semantic_hardest": (0.001, 1),
        }
        for field in fields(self):
            value = getattr(self, field.name)
            low, high = limits.get(field.name, (0, math.inf))
            if not isinstance(value, str) and not low <= value <= high:
                raise BadRequest(f"{field.name} is {value}; it must lie between {low} and {high}")
        if self.mask_id not in ("sigmoid", "softmax"):
            raise BadRequest(f"mask_id is {self.mask_id!r}; it must be 'sigmoid' or 'softmax'")


def _precise(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run without autocast, with half-precision tensors widened; the first argument is a tensor."""

    def widen(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.autocast(cast(Tensor, args[0]).device.type, enabled=False):
            return function(*map(widen, args), **{key: widen(value) for key, value in kwargs.items()})  # type: ignore[arg-type]

    return run


@_precise
@torch.no_grad()
def match(masks: Tensor, classes: Tensor, targets: Targets) -> Matching:
    """Assign segments to slots so that the sum of mask similarity times class probability is largest.

    `masks` (B, N, h, w) and `classes` (B, N, K + 1) are logits of the final prediction. Mask similarity is
    dice of softmax over slots, without void pixels. Each segment gets a slot of its own; where an image has
    more segments than slots, the assignment with the largest sum leaves some without one, and the dice and
    mask-ID losses treat their pixels as void.
    """
    probabilities = masks.softmax(1).flatten(2)
    truth = targets.masks.flatten(2).to(probabilities.dtype)
    void = targets.void.flatten(1)
    inside, outside = (probabilities @ torch.stack([~void, void], 2).to(truth.dtype)).unbind(2)
    half_sums = (inside[..., None] + targets.areas[:, None]) / 2
    mask_scores = probabilities @ truth.transpose(1, 2) / (half_sums + _DICE_EPSILON)
    labels = targets.classes.clamp(min=0)[:, None].expand(-1, masks.shape[1], -1)
    class_scores = classes.softmax(-1)[..., :-1].gather(2, labels)

    slots = _assign(-mask_scores * class_scores, targets.present)
    index = slots.clamp(min=0)[:, None]
    dice_weights = class_scores.gather(1, index)[:, 0].clamp(min=_LEAST_WEIGHT) * (slots >= 0)
    on_void = outside / (inside + outside + _DICE_EPSILON)
    class_weights = _put(on_void, slots, mask_scores.gather(1, index)[:, 0])
    return Matching(slots, dice_weights, class_weights.clamp(min=_LEAST_WEIGHT))


def _assign(costs: Tensor, present: Tensor) -> Tensor:
    """(B, N, S) costs, (B, S) bool -> (B, S) the slot of each segment, or -1."""
    # Padding is marked within the costs, so that one copy brings a whole batch to the host.
    table = costs.masked_fill(~present[:, None], math.inf).cpu().numpy()
    slots = np.full((table.shape[0], table.shape[2]), -1, np.int64)
    for row, cost in zip(slots, table, strict=True):
        columns = np.flatnonzero(~np.isposinf(cost).any(0))
        # A network that has diverged shall be reported by its loss, not by the solver.
        rows, chosen = linear_sum_assignment(np.nan_to_num(cost[:, columns]))
        row[columns[chosen]] = rows
    return torch.from_numpy(slots).to(costs.device)


def _slot_map(slots: Tensor, targets: Targets) -> Tensor:
    """(B, h, w) int64: the slot that answers for the pixel, -1 where none does."""
    by_number = F.pad(slots, (1, 0), value=-1)
    return by_number.gather(1, targets.segments.flatten(1) + 1).view_as(targets.segments)


def _put(into: Tensor, slots: Tensor, values: Tensor) -> Tensor:
    """A copy of (B, N) `into` with the values (B, S) of the segments at their slots."""
    spare = F.pad(into, (0, 1))
    # Segments without a slot write into a column that is then dropped.
    index = torch.where(slots < 0, into.shape[1], slots)
    return spare.scatter(1, index, values.to(into.dtype))[:, :-1]


def class_targets(matching: Matching, targets: Targets, slots: int, classes: int) -> Tensor:
    """(B, N, K + 1) float32 one-hot labels: the class of a slot's segment, void (the last) without one.

    `slots` is N, `classes` is K, without void.
    """
    void = torch.full((len(matching.slots), slots), classes, device=matching.slots.device)
    return F.one_hot(_put(void, matching.slots, targets.classes), classes + 1).float()


@_precise
@torch.no_grad()
def reclass_targets(
    masks: Tensor, onehot: Tensor, targets: Targets, eta: float, kind: Activation = "sigmoid"
) -> Tensor:
    """ReClass, equations 6.3 and 6.4: labels softened by the classes that a slot's mask lies on.

    `masks` (B, N, h, w) are logits before ReMask, `onehot` (B, N, K + 1) the labels. A class gets `eta`
    times the part of its pixels that the mask covers (zero for a class that the image does not have), and
    the own class 1 - eta beside. As published, a row is not normalised: its sum can exceed 1 or stay below.
    The rows of unmatched slots, whose label is void, stay as they are. Constant: no gradient.
    """
    classes = torch.arange(onehot.shape[-1] - 1, device=masks.device)
    maps = (targets.semantic.flatten(1)[..., None] == classes).to(masks.dtype)
    overlaps = _activate(masks, kind).flatten(2) @ maps / maps.sum(1, keepdim=True).clamp(min=1)
    soft = eta * F.pad(overlaps, (0, 1)) + (1 - eta) * onehot
    return torch.where(onehot[..., -1:] > 0, onehot, soft)


@_precise
def remask(masks: Tensor, classes: Tensor, semantic: Tensor, kind: Activation = "sigmoid") -> Tensor:
    """ReMask, equations 6.1 and 6.2: mask logits scaled by how well their classes fit the pixel.

    `masks` (B, N, h, w), `classes` (B, N, K + 1) and `semantic` (B, K, h, w) are logits of one block at its
    own stride; returns masks (B, N, h, w). The activation is over the K classes without void, for slots and
    pixels alike. The semantic logits get no gradient, masks and classes do.
    """
    fits = _activate(classes[..., :-1], kind, dim=-1) @ _activate(semantic.detach(), kind).flatten(2)
    return masks + fits.view_as(masks) * masks


def _activate(logits: Tensor, kind: Activation, dim: int = 1) -> Tensor:
    return logits.sigmoid() if kind == "sigmoid" else logits.softmax(dim)


@_precise
def class_loss(
    classes: Tensor, labels: Tensor, matching: Matching, *, positive_weight: float = 0.75
) -> Tensor:
    """Class term of the PQ-style loss: weighted cross-entropy of the slots, a scalar.

    `classes` (B, N, K + 1) are logits, `labels` (B, N, K + 1) come from `class_targets` or
    `reclass_targets`. Averaged over the slots whose loss is not zero.
    """
    losses = -(labels * classes.log_softmax(-1)).sum(-1)
    void = labels[..., -1]
    alpha = positive_weight * (1 - void) + (1 - positive_weight) * void
    losses = alpha * matching.class_weights * losses
    return _mean(losses, losses != 0)


@_precise
def dice_loss(
    masks: Tensor, matching: Matching, targets: Targets, *, positive_weight: float = 0.75
) -> Tensor:
    """Dice term of the PQ-style loss, over softmax of the slots without void pixels, a scalar.

    `masks` (B, N, h, w) are logits. The sum over matched segments is divided by N, as the class term is.
    """
    owners = _slot_map(matching.slots, targets).flatten(1)
    probabilities = masks.softmax(1).flatten(2)
    labelled = (owners >= 0).to(masks.dtype)
    own = probabilities.gather(1, owners.clamp(min=0)[:, None])[:, 0]
    shared = (targets.masks.flatten(2).to(masks.dtype) @ own[..., None])[..., 0]
    sizes = (probabilities @ labelled[..., None])[..., 0].gather(1, matching.slots.clamp(min=0))
    losses = 1 - (2 * shared + 1) / (sizes + targets.areas + 1)
    sums = (matching.dice_weights * losses).sum(1)
    return positive_weight / masks.shape[1] * sums.mean()


@_precise
def mask_id_loss(
    masks: Tensor, matching: Matching, targets: Targets, *, kind: Activation = "sigmoid"
) -> Tensor:
    """Mask-ID cross-entropy: which slot a pixel belongs to, a scalar.

    `masks` (B, N, h, w) are logits. `softmax` is kMaX-DeepLab's: averaged over the pixels whose loss is not
    zero. `sigmoid` is ReMaX's, whose normalisation is not published: here the N binary cross-entropies of
    a pixel are summed and averaged over the labelled pixels, so that one pixel weighs as with softmax.
    """
    owners = _slot_map(matching.slots, targets).flatten(1)
    if kind == "softmax":
        losses = F.cross_entropy(masks.flatten(2), owners, ignore_index=-1, reduction="none")
        return _mean(losses, losses != 0)
    false_positive, false_negative = _binary_losses(masks, owners)
    return _mean(false_positive + false_negative, owners >= 0)


@_precise
@torch.no_grad()
def false_positive_ratio(masks: Tensor, matching: Matching, targets: Targets) -> Tensor:
    """Sigmoid cross-entropy over negatives divided by that over positives, a scalar (chapter 6, figure 1).

    Sums of the whole batch, void pixels apart; 0 where there are no positives. `masks` (B, N, h, w) are
    logits.
    """
    negative, positive = _binary_losses(masks, _slot_map(matching.slots, targets).flatten(1))
    return torch.where(positive.sum() > 0, negative.sum() / positive.sum(), 0.0)


def _binary_losses(masks: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid cross-entropy of each pixel (B, h * w): summed over the slots that are wrong, of the right one.

    Both are zero where `owners` (B, h * w) has no slot.
    """
    labelled = owners >= 0
    own = masks.flatten(2).gather(1, owners.clamp(min=0)[:, None])[:, 0]
    wrong = F.softplus(masks).sum(1).flatten(1) - F.softplus(own)
    return wrong * labelled, F.softplus(-own) * labelled


@torch.no_grad()
def sample_pixels(
    targets: Targets, samples: int, temperature: float, generator: Generator | None = None
) -> Tensor:
    """(B, k) int64 numbers of different pixels of h * w, k the smaller of `samples` and h * w.

    Drawn by Gumbel-top-k: a labelled pixel with odds (h * w / area of its segment) ** temperature, void
    pixels only once the labelled ones are used up.
    """
    segments = targets.segments.flatten(1)
    pixels = segments.shape[1]
    if samples >= pixels:
        return torch.arange(pixels, device=segments.device).expand(segments.shape)
    areas = F.pad(targets.areas, (1, 0), value=1).gather(1, segments + 1)
    logits = temperature * torch.log(pixels / areas) + _VOID_LOGIT * (segments < 0)
    # Drawn where the generator lives: a CPU generator then gives the same pixels on every device.
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(logits.shape, generator=generator, device=device).to(logits.device)
    return (logits - torch.log(-torch.log(uniform))).topk(samples, sorted=False).indices


@_precise
def instance_loss(
    pixels: Tensor,
    targets: Targets,
    *,
    samples: int = 4096,
    temperature: float = 1.5,
    similarity_temperature: float = 0.3,
    generator: Generator | None = None,
) -> Tensor:
    """Instance discrimination: sampled pixels of a segment shall have like features, a scalar.

    `pixels` (B, D, h, w) are the pixel features; `samples` and `temperature` go to `sample_pixels`. For
    each sampled pixel, cross-entropy between the softmax of its similarities to all of them and an even
    share for those of its own segment, itself included; averaged over the labelled ones. Void pixels that
    were drawn for want of others count as unlike all. Takes time and memory of samples squared.
    """
    chosen = sample_pixels(targets, samples, temperature, generator)
    features = pixels.flatten(2).gather(2, chosen[:, None].expand(-1, pixels.shape[1], -1))
    segments = targets.segments.flatten(1).gather(1, chosen)
    members = F.one_hot(segments + 1, targets.masks.shape[1] + 1).to(features.dtype)
    # The mean similarity to one's segment is the similarity to its mean: no second matrix of k x k.
    means = features @ members / members.sum(1, keepdim=True).clamp(min=1)
    own = means.gather(2, (segments + 1)[:, None].expand_as(features))
    similarities = features.transpose(1, 2) @ features / similarity_temperature
    losses = similarities.logsumexp(2) - (features * own).sum(1) / similarity_temperature
    return _mean(losses, segments >= 0)


@_precise
def semantic_loss(
    semantic: Tensor,
    targets: Targets,
    *,
    samples: int = 4096,
    temperature: float = 2.0,
    hardest: float = 1.0,
    generator: Generator | None = None,
) -> Tensor:
    """Cross-entropy of a semantic head on sampled pixels, a scalar.

    `semantic` (B, C, h, w) are logits, C at least K; pixels without a class are left out. `samples` 0 takes
    all pixels. Only the part `hardest` of the pixels of an image, those with the largest loss, counts;
    averaged over the pixels whose loss is not zero.
    """
    logits, labels = semantic.flatten(2), targets.semantic.flatten(1)
    if samples:
        chosen = sample_pixels(targets, samples, temperature, generator)
        logits = logits.gather(2, chosen[:, None].expand(-1, logits.shape[1], -1))
        labels = labels.gather(1, chosen)
    losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
    if hardest < 1:
        losses = losses.topk(round(hardest * losses.shape[1]), sorted=False).values
    return _mean(losses, losses != 0)


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of (B, P) `losses` over the counted of each image, then over the images."""
    sums = torch.where(counted, losses, 0).sum(1)
    return (sums / counted.sum(1).clamp(min=1)).mean()


def panoptic_losses(
    final: Prediction,
    blocks: Sequence[Prediction],
    targets: Targets,
    config: LossConfig,
    *,
    semantic: Tensor | None = None,
    block_semantic: Sequence[Tensor] = (),
    matching: Matching | None = None,
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """All losses of a training step, by name and weighted, and `total`, their sum.

    The names are `class`, `dice`, `mask_id`, `instance`; the same after `block_I_` for each decoder block
    (deep supervision, with the same weights and with the matching of the final prediction); `semantic` with
    the auxiliary head's logits `semantic` (B, C, h', w'); and `block_I_semantic` for the logits
    `block_semantic` (B, K, h_I, w_I) of the ReMask heads, which belong to the first blocks. `matching` is
    that of the final prediction, made here where it is not given.

    A block's mask logits are relaxed by ReMask at the block's own stride and then, like its pixel features
    and all semantic logits, resized to the final size (bilinear, corners aligned). Resized features are not
    normalised again, as in the authors' code. Raises BadRequest for ground truth of another size than the
    final masks, and for more ReMask heads than blocks.
    """
    _check(final, blocks, targets, block_semantic)
    if matching is None:
        matching = match(final.masks, final.classes, targets)
    losses = _prediction_losses(final, final.masks, matching, targets, config, generator)
    if semantic is not None:
        part = _semantic_part(semantic, targets, config, generator)
        losses["semantic"] = config.semantic_weight * part
    for number, block in enumerate(blocks):
        head = block_semantic[number] if number < len(block_semantic) else None
        parts = _block_losses(block, head, matching, targets, config, generator)
        losses |= {f"block_{number}_{name}": part for name, part in parts.items()}
    losses["total"] = torch.stack(list(losses.values())).sum()
    return losses


def _check(
    final: Prediction, blocks: Sequence[Prediction], targets: Targets, block_semantic: Sequence[Tensor]
) -> None:
    size, truth = tuple(final.masks.shape[-2:]), tuple(targets.masks.shape[-2:])
    if size != truth:
        raise BadRequest(f"the ground truth is {truth} pixels; it must be {size}, as the final masks are")
    if len(block_semantic) > len(blocks):
        raise BadRequest(f"there are {len(block_semantic)} ReMask heads for {len(blocks)} blocks")


def _block_losses(
    block: Prediction,
    head: Tensor | None,
    matching: Matching,
    targets: Targets,
    config: LossConfig,
    generator: Generator | None,
) -> dict[str, Tensor]:
    """The weighted losses of a decoder block; `head` are the logits of its ReMask head, if it has one."""
    relaxed, losses = block.masks, {}
    if head is not None:
        part = _semantic_part(head, targets, config, generator)
        losses["semantic"] = config.relaxed_semantic_weight * part
        relaxed = remask(block.masks, block.classes, head, config.mask_id)
    masks = _resize(relaxed, targets)
    raw = masks if head is None else _resize(block.masks.detach(), targets)
    resized = Prediction(masks, block.classes, _resize(block.pixels, targets))
    return losses | _prediction_losses(resized, raw, matching, targets, config, generator)


def _prediction_losses(
    prediction: Prediction,
    raw: Tensor,
    matching: Matching,
    targets: Targets,
    config: LossConfig,
    generator: Generator | None,
) -> dict[str, Tensor]:
    """The weighted losses of one prediction at the final size; `raw` are its masks before ReMask."""
    masks, classes, alpha = prediction.masks, prediction.classes, config.positive_weight
    labels = class_targets(matching, targets, classes.shape[1], classes.shape[2] - 1)
    if config.reclass_eta:
        labels = reclass_targets(raw, labels, targets, config.reclass_eta, config.mask_id)
    instance = instance_loss(
        prediction.pixels,
        targets,
        samples=config.instance_samples,
        temperature=config.instance_temperature,
        similarity_temperature=config.similarity_temperature,
        generator=generator,
    )
    return {
        "class": config.pq_weight * class_loss(classes, labels, matching, positive_weight=alpha),
        "dice": config.dice_weight * dice_loss(masks, matching, targets, positive_weight=alpha),
        "mask_id": config.mask_id_weight * mask_id_loss(masks, matching, targets, kind=config.mask_id),
        "instance": config.instance_weight * instance,
    }


def _semantic_part(
    semantic: Tensor, targets: Targets, config: LossConfig, generator: Generator | None
) -> Tensor:
    return semantic_loss(
        _resize(semantic, targets),
        targets,
        samples=config.semantic_samples,
        temperature=config.semantic_temperature,
        hardest=config.semantic_hardest,
        generator=generator,
    )


def _resize(values: Tensor, targets: Targets) -> Tensor:
    size = targets.masks.shape[-2:]
    if values.shape[-2:] == size:
        return values
    return F.interpolate(values.float(), size=size, mode="bilinear", align_corners=True)
