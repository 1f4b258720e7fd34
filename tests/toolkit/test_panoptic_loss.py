"""Every loss against a second, slow implementation in loops; S, N, K and so on as in the module."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitkit.runtimes.errors import BadRequest
from vitkit.train.panoptic_loss import (
    LossConfig,
    Prediction,
    Targets,
    class_loss,
    class_targets,
    dice_loss,
    false_positive_ratio,
    instance_loss,
    mask_id_loss,
    match,
    panoptic_losses,
    reclass_targets,
    remask,
    sample_pixels,
    semantic_loss,
)

B, N, K, S, D, H, W = 3, 6, 4, 4, 5, 7, 6
ALL = 10**6
EXACT = LossConfig(instance_samples=ALL, semantic_samples=0)
NAMES = ("class", "dice", "mask_id", "instance")


def targets_of(ids: np.ndarray, classes: np.ndarray, semantic: np.ndarray | None = None) -> Targets:
    """`ids` (B, h, w) number the segments, -1 on void; `classes` (B, S)."""
    masks = ids[:, None] == np.arange(classes.shape[1])[:, None, None]
    if semantic is None:
        semantic = np.full(ids.shape, -1)
        for b, s in np.ndindex(classes.shape):
            semantic[b][masks[b, s]] = classes[b, s]
    return Targets(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (masks, classes, semantic)))


@pytest.fixture
def truth() -> Targets:
    """Three images: all four segments and void; two segments and a crowd region; one that covers all."""
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, S, (B, H, W))
    ids[1] = np.where(ids[1] >= 2, -1, ids[1])
    ids[2] = 0
    classes = rng.integers(0, K, (B, S))
    classes[1, 2:] = classes[2, 1:] = -1
    semantic = np.where(
        ids < 0, -1, np.take_along_axis(classes, ids.clip(0).reshape(B, -1), 1).reshape(ids.shape)
    )
    semantic[1, :2] = np.where(ids[1, :2] < 0, 3, semantic[1, :2])
    return targets_of(ids, classes, semantic)


def prediction(
    seed: int = 0, size: tuple[int, int] = (H, W), slots: int = N, scale: float = 2.0
) -> Prediction:
    generator = torch.Generator().manual_seed(seed)
    return Prediction(
        (scale * torch.randn(B, slots, *size, generator=generator)).requires_grad_(),
        torch.randn(B, slots, K + 1, generator=generator).requires_grad_(),
        F.normalize(torch.randn(B, D, *size, generator=generator), dim=1).requires_grad_(),
    )


def logits(seed: int, channels: int = K, size: tuple[int, int] = (H, W)) -> torch.Tensor:
    return torch.randn(B, channels, *size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [t.detach().double().numpy() if t.is_floating_point() else t.numpy() for t in tensors]


def segments_of(truth: Targets, b: int) -> list[int]:
    masks, classes = arrays(truth.masks[b], truth.classes[b])
    return [s for s in range(len(classes)) if classes[s] >= 0 and masks[s].any()]


def scores(masks: np.ndarray, classes: np.ndarray, truth: Targets, b: int):
    """Mask similarity and class probability (N, S) of one image; zero for padding."""
    segments, labels = arrays(truth.masks[b], truth.classes[b])
    labelled, p, q = segments.any(0), softmax(masks[b], 0), softmax(classes[b], 1)
    mask_scores, class_scores = np.zeros((2, len(p), len(labels)))
    for n, s in itertools.product(range(len(p)), segments_of(truth, b)):
        both = (p[n] * segments[s]).sum()
        mask_scores[n, s] = both / (((p[n] * labelled).sum() + segments[s].sum()) / 2 + 1e-5)
        class_scores[n, s] = q[n, labels[s]]
    return mask_scores, class_scores


def slow_weights(masks: np.ndarray, classes: np.ndarray, truth: Targets, slots: np.ndarray):
    dice_weights, class_weights = np.zeros(slots.shape), np.zeros(masks.shape[:2])
    for b in range(len(masks)):
        mask_scores, class_scores = scores(masks, classes, truth, b)
        segments, p = truth.masks[b].numpy(), softmax(masks[b], 0)
        void = ~segments[slots[b] >= 0].any(0)
        for n in range(masks.shape[1]):
            class_weights[b, n] = max((p[n] * void).sum() / (p[n].sum() + 1e-5), 1e-5)
        for s, n in enumerate(slots[b]):
            if n >= 0:
                class_weights[b, n] = max(mask_scores[n, s], 1e-5)
                dice_weights[b, s] = max(class_scores[n, s], 1e-5)
    return dice_weights, class_weights


def mean_of_nonzero(values: list[float]) -> float:
    kept = [value for value in values if value != 0]
    return sum(kept) / len(kept) if kept else 0.0


def slow_class(classes, labels, class_weights):
    means = []
    for b in range(len(classes)):
        losses = []
        for n, row in enumerate(classes[b]):
            alpha = 0.25 if labels[b, n, -1] == 1 else 0.75
            losses.append(alpha * class_weights[b, n] * -(labels[b, n] * np.log(softmax(row, 0))).sum())
        means.append(mean_of_nonzero(losses))
    return np.mean(means)


def slow_dice(masks, truth, slots, dice_weights):
    sums = []
    for b in range(len(masks)):
        segments = truth.masks[b].numpy()
        matched = [s for s in range(len(segments)) if slots[b, s] >= 0]
        p = softmax(masks[b], 0) * segments[matched].any(0)
        total = 0.0
        for s in matched:
            n, g = slots[b, s], segments[s]
            total += dice_weights[b, s] * (1 - (2 * (p[n] * g).sum() + 1) / (p[n].sum() + g.sum() + 1))
        sums.append(0.75 / masks.shape[1] * total)
    return np.mean(sums)


def slow_mask_id(masks, truth, slots, kind):
    """The loss, and the two sums of the ratio of false positives to false negatives."""
    means, positive, negative = [], 0.0, 0.0
    for b in range(len(masks)):
        losses = []
        for y, x in np.ndindex(masks.shape[2:]):
            (owner,) = slots[b][truth.masks[b, :, y, x].numpy()] if truth.masks[b, :, y, x].any() else (-1,)
            if owner < 0:
                continue
            column = masks[b, :, y, x]
            target = np.arange(len(column)) == owner
            if kind == "softmax":
                losses.append(-np.log(softmax(column, 0)[owner]))
                continue
            pieces = -np.where(target, np.log(sigmoid(column)), np.log(sigmoid(-column)))
            positive, negative = positive + pieces[target].sum(), negative + pieces[~target].sum()
            losses.append(pieces.sum())
        means.append(mean_of_nonzero(losses))
    return np.mean(means), negative / positive if positive else 0.0


def slow_instance(pixels, ids, tau):
    """`pixels` (B, D, k) and the segments `ids` (B, k) of the sampled pixels."""
    means = []
    for b in range(len(pixels)):
        losses = []
        for i, segment in enumerate(ids[b]):
            if segment < 0:
                continue
            log_p = np.log(softmax(pixels[b].T @ pixels[b][:, i] / tau, 0))
            same = ids[b] == segment
            losses.append(-(log_p * same / same.sum()).sum())
        means.append(np.mean(losses) if losses else 0.0)
    return np.mean(means)


def slow_semantic(semantic, labels, hardest=1.0):
    means = []
    for b in range(len(semantic)):
        losses = [
            -np.log(softmax(semantic[b][:, i], 0)[label]) if label >= 0 else 0.0
            for i, label in enumerate(labels[b])
        ]
        means.append(mean_of_nonzero(sorted(losses)[::-1][: round(hardest * len(losses))]))
    return np.mean(means)


def slow_overlaps(masks, truth, kind):
    """Equation 6.3: (B, N, K)."""
    overlaps = np.zeros((*masks.shape[:2], K))
    for b, n, c in np.ndindex(overlaps.shape):
        p = sigmoid(masks[b, n]) if kind == "sigmoid" else softmax(masks[b], 0)[n]
        there = truth.semantic[b].numpy() == c
        overlaps[b, n, c] = (p * there).sum() / there.sum() if there.any() else 0.0
    return overlaps


@pytest.mark.parametrize("slots", [N, 3, 2])
def test_matching_is_the_best_of_all_assignments(truth, slots):
    guess = prediction(slots=slots)
    matching = match(guess.masks, guess.classes, truth)
    masks, classes, chosen = arrays(guess.masks, guess.classes, matching.slots)
    for b in range(B):
        gain = np.multiply(*scores(masks, classes, truth, b))
        real = segments_of(truth, b)
        if len(real) <= slots:
            options = (zip(p, real, strict=True) for p in itertools.permutations(range(slots), len(real)))
        else:
            options = (zip(range(slots), p, strict=True) for p in itertools.permutations(real, slots))
        best = max(sum(gain[n, s] for n, s in option) for option in options)
        taken = [(n, s) for s, n in enumerate(chosen[b]) if n >= 0]
        assert {s for _, s in taken} <= set(real)
        assert len({n for n, _ in taken}) == len(taken) == min(len(real), slots)
        assert sum(gain[n, s] for n, s in taken) == pytest.approx(best, rel=1e-5)
    expected = slow_weights(masks, classes, truth, chosen)
    for weights, slow in zip((matching.dice_weights, matching.class_weights), expected, strict=True):
        np.testing.assert_allclose(weights, slow, rtol=1e-5)


@pytest.mark.parametrize("slots", [N, 2])
def test_slot_losses_equal_their_definition(truth, slots):
    guess = prediction(slots=slots)
    matching = match(guess.masks, guess.classes, truth)
    labels = class_targets(matching, truth, slots, K)
    masks, classes, chosen, onehot = arrays(guess.masks, guess.classes, matching.slots, labels)
    dice_weights, class_weights = slow_weights(masks, classes, truth, chosen)

    expected = np.zeros((B, slots, K + 1))
    expected[..., K] = 1
    for b, s in zip(*np.nonzero(chosen >= 0), strict=True):
        expected[b, chosen[b, s]] = np.arange(K + 1) == truth.classes[b, s].item()
    np.testing.assert_array_equal(onehot, expected)
    loss = class_loss(guess.classes, labels, matching)
    assert loss.item() == pytest.approx(slow_class(classes, onehot, class_weights), rel=1e-5)
    loss = dice_loss(guess.masks, matching, truth)
    assert loss.item() == pytest.approx(slow_dice(masks, truth, chosen, dice_weights), rel=1e-5)
    for kind in ("softmax", "sigmoid"):
        loss = mask_id_loss(guess.masks, matching, truth, kind=kind)
        slow, ratio = slow_mask_id(masks, truth, chosen, kind)
        assert loss.item() == pytest.approx(slow, rel=1e-5)
    assert false_positive_ratio(guess.masks, matching, truth).item() == pytest.approx(ratio, rel=1e-5)


def test_pixels_that_are_right_beyond_float_do_not_thin_out_the_softmax_mean(truth):
    guess = prediction()
    matching = match(guess.masks, guess.classes, truth)
    sure = guess.masks.detach().clone()
    segment = truth.segments[2, 0, 0]
    sure[2, matching.slots[2, segment], :3] = 200.0
    masks, chosen = arrays(sure, matching.slots)
    masks[2] = np.where(masks[2] == 200, 1000.0, masks[2])
    with np.errstate(divide="ignore"):
        slow, _ = slow_mask_id(masks, truth, chosen, "softmax")
    assert mask_id_loss(sure, matching, truth, kind="softmax").item() == pytest.approx(slow, rel=1e-5)


def test_a_slot_whose_class_is_certain_is_left_out_of_the_mean(truth):
    guess = prediction()
    matching = match(guess.masks, guess.classes, truth)
    labels = class_targets(matching, truth, N, K)
    sure = torch.where(labels > 0, 1000.0, guess.classes.detach())
    certain = torch.arange(N)[:, None] == 1
    mixed = torch.where(certain, sure, guess.classes)
    _, class_weights = slow_weights(*arrays(guess.masks, guess.classes), truth, matching.slots.numpy())
    with np.errstate(divide="ignore", invalid="ignore"):
        classes, onehot = arrays(mixed, labels)
        classes[:, 1] = np.where(onehot[:, 1] > 0, 50.0, -50.0)
        slow = slow_class(classes, onehot, class_weights)
    assert class_loss(mixed, labels, matching).item() == pytest.approx(slow, rel=1e-5)


def test_instance_loss_over_all_pixels(truth):
    pixels = prediction().pixels
    array, ids = arrays(pixels.flatten(2), truth.segments.flatten(1))
    loss = instance_loss(pixels, truth, samples=ALL, similarity_temperature=0.3)
    assert loss.item() == pytest.approx(slow_instance(array, ids, 0.3), rel=1e-5)


@pytest.mark.parametrize("samples", [7, 38])
def test_sampled_losses_are_those_of_the_sampled_pixels(truth, samples):
    pixels, semantic = prediction().pixels, logits(1)

    def generator():
        return torch.Generator().manual_seed(5)

    chosen = sample_pixels(truth, samples, 1.5, generator())
    assert chosen.shape == (B, samples)
    assert all(len(set(row.tolist())) == samples for row in chosen)
    array = np.take_along_axis(arrays(pixels.flatten(2))[0], chosen[:, None].numpy(), 2)
    ids = truth.segments.flatten(1).gather(1, chosen).numpy()
    loss = instance_loss(pixels, truth, samples=samples, temperature=1.5, generator=generator())
    assert loss.item() == pytest.approx(slow_instance(array, ids, 0.3), rel=1e-5)

    chosen = sample_pixels(truth, samples, 2.0, generator())
    array = np.take_along_axis(arrays(semantic.flatten(2))[0], chosen[:, None].numpy(), 2)
    labels = truth.semantic.flatten(1).gather(1, chosen).numpy()
    loss = semantic_loss(semantic, truth, samples=samples, temperature=2.0, generator=generator())
    assert loss.item() == pytest.approx(slow_semantic(array, labels), rel=1e-5)


@pytest.mark.parametrize("hardest", [1.0, 0.2])
@pytest.mark.parametrize("channels", [K, K + 1])
def test_semantic_loss_over_all_pixels(truth, hardest, channels):
    semantic = logits(1, channels)
    array, labels = arrays(semantic.flatten(2), truth.semantic.flatten(1))
    loss = semantic_loss(semantic, truth, samples=0, hardest=hardest)
    assert loss.item() == pytest.approx(slow_semantic(array, labels, hardest), rel=1e-5)


def test_sampling_prefers_small_segments_by_the_temperature():
    ids = np.zeros((1, 6, 10), int)
    ids[0, :, 9], ids[0, 0, :5] = -1, 1  # areas 49 and 5, six void pixels
    truth = targets_of(ids, np.array([[0, 1]]))
    many = Targets(truth.masks.expand(4000, -1, -1, -1), truth.classes, truth.semantic)
    for temperature in (0.0, 1.0, 1.5):
        drawn = sample_pixels(many, 1, temperature, torch.Generator().manual_seed(0))
        odds = 5 * (60 / 5) ** temperature, 49 * (60 / 49) ** temperature
        share = (torch.from_numpy(ids).flatten()[drawn] == 1).double().mean().item()
        assert share == pytest.approx(odds[0] / sum(odds), abs=0.03)
    drawn = sample_pixels(many, 54, 1.5)
    assert not truth.void.flatten()[drawn].any()
    assert truth.void.flatten()[sample_pixels(many, 56, 1.5)].sum() == 2 * 4000


def test_remask_is_its_formula_and_spares_the_semantic_head(truth):
    guess, semantic = prediction(), logits(2)
    m, p, s = arrays(guess.masks, guess.classes[..., :-1], semantic)
    for kind, over in (("sigmoid", lambda x, axis: sigmoid(x)), ("softmax", softmax)):
        fits = np.einsum("bnk,bkyx->bnyx", over(p, 2), over(s, 1))
        np.testing.assert_allclose(
            remask(guess.masks, guess.classes, semantic, kind).detach(), m + fits * m, rtol=1e-5, atol=1e-6
        )
    remask(guess.masks, guess.classes, semantic).square().sum().backward()
    assert semantic.grad is None
    assert guess.masks.grad.abs().sum() > 0
    assert guess.classes.grad[..., :-1].abs().sum() > 0
    assert guess.classes.grad[..., -1].abs().sum() == 0


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_reclass_softens_the_labels_of_matched_slots_only(truth, kind):
    guess = prediction()
    matching = match(guess.masks, guess.classes, truth)
    onehot = class_targets(matching, truth, N, K)
    assert torch.equal(reclass_targets(guess.masks, onehot, truth, 0.0, kind), onehot)
    soft = reclass_targets(guess.masks, onehot, truth, 0.1, kind)
    assert not soft.requires_grad
    matched = onehot[..., K] == 0
    assert 0 < matched.sum() < matched.numel()
    assert torch.equal(soft[~matched], onehot[~matched])
    expected = 0.9 * onehot.double().numpy()
    expected[..., :K] += 0.1 * slow_overlaps(arrays(guess.masks)[0], truth, kind)
    np.testing.assert_allclose(soft[matched], expected[matched.numpy()], rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_all_losses_together(truth, kind):
    """Two blocks, the first with ReMask, at their own strides: every part from the pieces by hand."""
    config = replace(EXACT, mask_id=kind)
    final, blocks = prediction(0), [prediction(1, (4, 3)), prediction(2, (4, 3))]
    semantic, head = logits(3, K + 1), logits(4, K, (4, 3))
    losses = panoptic_losses(final, blocks, truth, config, semantic=semantic, block_semantic=[head])
    names = [*NAMES, "semantic", "block_0_semantic"]
    names += [f"block_{i}_{name}" for i in (0, 1) for name in NAMES]
    assert set(losses) == {*names, "total"}
    assert losses["total"].item() == pytest.approx(sum(losses[name].item() for name in names), rel=1e-5)

    def grown(x):
        return F.interpolate(x, size=(H, W), mode="bilinear", align_corners=True)

    matching = match(final.masks, final.classes, truth)
    onehot = class_targets(matching, truth, N, K)
    cases = {
        "": (final.masks, final.masks, final),
        "block_0_": (
            grown(remask(blocks[0].masks, blocks[0].classes, head, kind)), grown(blocks[0].masks), blocks[0],
        ),
        "block_1_": (grown(blocks[1].masks), grown(blocks[1].masks), blocks[1]),
    }  # fmt: skip
    for prefix, (masks, raw, guess) in cases.items():
        labels = reclass_targets(raw, onehot, truth, 0.1, kind)
        expected = {
            "class": 3 * class_loss(guess.classes, labels, matching),
            "dice": 3 * dice_loss(masks, matching, truth),
            "mask_id": 0.3 * mask_id_loss(masks, matching, truth, kind=kind),
            "instance": instance_loss(grown(guess.pixels), truth, samples=ALL),
        }
        for name, value in expected.items():
            assert losses[prefix + name].item() == pytest.approx(value.item(), rel=1e-5), prefix + name
    assert losses["semantic"].item() == pytest.approx(
        semantic_loss(semantic, truth, samples=0).item(), rel=1e-5
    )
    assert losses["block_0_semantic"].item() == pytest.approx(
        0.5 * semantic_loss(grown(head), truth, samples=0).item(), rel=1e-5
    )


def test_a_matching_that_is_given_is_taken(truth):
    final, other = prediction(0), prediction(9)
    matching = match(other.masks, other.classes, truth)
    losses = panoptic_losses(final, [], truth, EXACT, matching=matching)
    assert losses["dice"].item() == pytest.approx(
        3 * dice_loss(final.masks, matching, truth).item(), rel=1e-5
    )
    own = match(final.masks, final.classes, truth)
    assert losses["dice"].item() != pytest.approx(3 * dice_loss(final.masks, own, truth).item(), rel=1e-2)


def test_gradients_reach_every_prediction_and_semantic_heads_only_through_their_own_loss(truth):
    final, block = prediction(0), prediction(1, (4, 3))
    head = logits(4, K, (4, 3))
    losses = panoptic_losses(final, [block], truth, EXACT, block_semantic=[head])
    (losses["total"] - losses["block_0_semantic"]).backward(retain_graph=True)
    for guess in (final, block):
        for part in (guess.masks, guess.classes, guess.pixels):
            assert part.grad.abs().sum() > 0
            assert part.grad.isfinite().all()
    assert head.grad is None or head.grad.abs().max() < 1e-6
    losses["block_0_semantic"].backward()
    assert head.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("segments", [0, 2])
def test_images_without_segments_give_finite_losses(kind, segments):
    """No image has a segment, and then only the first has one; padding has no mask and no class."""
    ids, classes = np.full((B, H, W), -1), np.full((B, segments), -1)
    if segments:
        ids[0, 2:4], classes[0, 0] = 0, 1
    truth = targets_of(ids, classes)
    config = replace(EXACT, mask_id=kind)
    final, block, semantic, head = prediction(0), prediction(1, (4, 3)), logits(3), logits(4, K, (4, 3))
    losses = panoptic_losses(final, [block], truth, config, semantic=semantic, block_semantic=[head])
    losses["total"].backward()
    for tensor in (*losses.values(), *(p.grad for guess in (final, block) for p in guess)):
        assert tensor.isfinite().all()
    ratio = false_positive_ratio(final.masks, match(final.masks, final.classes, truth), truth)
    assert ratio.isfinite()
    if not segments:
        assert all(losses[name] == 0 for name in ("dice", "mask_id", "instance", "semantic"))
        assert losses["class"] > 0
        assert ratio == 0


def test_padding_order_and_lost_segments_change_nothing(truth):
    order = torch.tensor([2, 0, 3, 1])
    padded = Targets(
        torch.cat([truth.masks[:, order], torch.zeros(B, 3, H, W, dtype=torch.bool)], 1),
        # The last has a class but no pixel, as a segment has that falls between the sampled pixels.
        torch.cat([truth.classes[:, order], torch.tensor([[-1, -1, 2]] * B)], 1),
        truth.semantic,
    )
    final, block, head = prediction(0), prediction(1, (4, 3)), logits(4, K, (4, 3))
    slots = match(final.masks, final.classes, truth).slots
    again = match(final.masks, final.classes, padded).slots
    assert torch.equal(again[:, :S], slots[:, order])
    assert (again[:, S:] == -1).all()
    first, second = (
        panoptic_losses(final, [block], t, EXACT, block_semantic=[head]) for t in (truth, padded)
    )
    for name, value in first.items():
        assert second[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_autocast_and_half_precision_change_only_the_inputs(truth):
    final, block, head = prediction(0), prediction(1, (4, 3)), logits(4, K, (4, 3))
    halves = [Prediction(*(p.bfloat16() for p in guess)) for guess in (final, block)]
    wide = [Prediction(*(p.float() for p in guess)) for guess in halves]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = panoptic_losses(halves[0], halves[1:], truth, EXACT, block_semantic=[head.bfloat16()])
    plain = panoptic_losses(wide[0], wide[1:], truth, EXACT, block_semantic=[head.bfloat16().float()])
    for name, value in plain.items():
        assert mixed[name].dtype == torch.float32
        assert mixed[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_a_diverged_network_shows_in_the_loss_not_in_the_solver(truth):
    final = prediction()
    broken = Prediction(final.masks * float("nan"), final.classes, final.pixels)
    assert panoptic_losses(broken, [], truth, EXACT)["total"].isnan()


def test_what_cannot_be_is_refused(truth):
    with pytest.raises(BadRequest, match=r"\(7, 6\) pixels; it must be \(4, 3\)"):
        panoptic_losses(prediction(size=(4, 3)), [], truth, EXACT)
    with pytest.raises(BadRequest, match="1 ReMask heads for 0 blocks"):
        panoptic_losses(prediction(), [], truth, EXACT, block_semantic=[logits(1)])
    for change in ({"mask_id": "tanh"}, {"reclass_eta": 1.5}, {"dice_weight": -1.0}, {"instance_samples": 0}):
        with pytest.raises(BadRequest, match=next(iter(change))):
            LossConfig(**change)
