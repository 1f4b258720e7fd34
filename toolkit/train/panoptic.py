"""Training panoptic models: COCO's layout in memory, panoptic augmentation, relaxed losses, PQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

from vitkit.data.coco import PanopticImage, PanopticSet
from vitkit.data.coco.ids import read_ids
from vitkit.data.coco.read import find_splits, read_split
from vitkit.data.folder import listing_sha256
from vitkit.data.tars import has_index
from vitkit.evaluate import Network, panoptic
from vitkit.exporters.source import Source
from vitkit.models import Labels, configure, run_card
from vitkit.models.remax import STRIDES, Relaxed, RelaxedTraining, ReMaXConfig
from vitkit.runtimes.card import ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest
from vitkit.runtimes.image import read_image
from vitkit.train.config import TrainConfig, training_provenance
from vitkit.train.memory import in_memory
from vitkit.train.panoptic_loss import (
    LossConfig,
    Matching,
    Targets,
    false_positive_ratio,
    match,
    panoptic_losses,
    remask,
)
from vitkit.train.pixels import normalise, recolour
from vitkit.train.readable import check_readable, unreadable
from vitkit.train.shards import Shard


class Scene(NamedTuple):
    """An image in memory.

    `pixels` (H, W, 3) uint8 RGB; `numbers` (H, W) int32, which of the segments covers a pixel, from 1, and 0
    on void; `classes` (n + 1,) the class of each segment, `instances` (n + 1,) whether it is one, which a
    crowd is not; entry 0 is void's: -1 and False.
    """

    pixels: NDArray[np.uint8]
    numbers: NDArray[np.int32]
    classes: NDArray[np.int64]
    instances: NDArray[np.bool_]


class PanopticTraining:
    """A data set in COCO's panoptic layout, with a network that segments it; see `TrainingTask`."""

    metric, unit = panoptic.METRIC, panoptic.UNIT

    def __init__(self, config: TrainConfig, data: str | Path) -> None:
        if has_index(data):
            raise BadRequest(
                f"{data}: panoptic data are read from a folder in COCO's layout, not from shards"
            )
        if config.teacher:
            raise BadRequest(
                "teacher: distillation is for classifiers; panoptic models learn from labels alone"
            )
        data = Path(data)
        train, val = _read_splits(data)
        self.fingerprint = _fingerprint(data, [train, val])
        numbers = {category.id: i for i, category in enumerate(train.categories)}
        val, self.notes = _readable(val, numbers)
        self.config, self.card = config, _card(config, train, val)
        model = cast(ReMaXConfig, configure(config.model, self.card.provenance["options"]))
        self.size = model.image_size
        self.loss = LossConfig(
            mask_id="sigmoid" if model.mask_id == "sigmoid" else "softmax",
            reclass_eta=model.reclass_eta,
            instance_samples=config.samples,
            semantic_samples=config.samples,
        )
        self.val = val
        self.things = np.array([category.thing for category in train.categories])
        self.files: Sequence[Path] = [image.file for image in train.images]
        self.chunks: Sequence[int] = [len(self.files)]
        self.scenes = in_memory(
            train.images,
            lambda image: _load(image, numbers),
            config.cache_mb,
            lambda scene: scene.pixels.nbytes + scene.numbers.nbytes,
        )

    def trainable(self, network: nn.Module) -> nn.Module:
        """The network with its semantic heads, which only training needs."""
        return RelaxedTraining(network)  # type: ignore[arg-type]

    def expect(self, order: Sequence[int]) -> None:
        """Nothing: any image is as near as any other."""

    def sample(self, index: int, seed: int) -> Scene:
        """A training image scaled, mirrored, cropped to the network's size, and perhaps pasted into."""
        rng = np.random.default_rng(seed)
        scene = jittered(self.scenes[index], self.size, self.config, rng)
        count = len(self.files)
        if rng.random() < self.config.copy_paste and count > 1:
            # Never the image itself.
            other = self.scenes[(index + 1 + int(rng.integers(count - 1))) % count]
            scene = paste(scene, jittered(other, self.size, self.config, rng), self.things, rng)
        return scene

    def collate(self, samples: Sequence[Scene]) -> tuple[Tensor, ...]:
        """Samples of one size -> a batch.

        Pixels (B, size, size, 3) uint8 and, at the masks' stride, segment numbers (B, h, w), their classes
        (B, S + 1) and whether they are instances (B, S + 1), as in `Scene`.
        """
        return _collate(samples)

    def losses(self, module: nn.Module, data: tuple[Tensor, ...], generator: Generator) -> dict[str, Tensor]:
        """All losses of `panoptic_losses`, the blocks' summed, and figure 1's `fp_ratio`."""
        pixels, numbers, classes, instances = data
        images = recolour(normalise(pixels, self.card.image), self.config, generator)
        targets = _targets(numbers, classes, instances)
        out: Relaxed = module(images)
        # Once for all that needs it: each time, a GPU waits for the host.
        matching = match(out.final.masks, out.final.classes, targets)
        losses = panoptic_losses(
            out.final,
            out.blocks,
            targets,
            self.loss,
            semantic=out.semantic,
            block_semantic=out.block_semantic,
            matching=matching,
            generator=_on_device(generator, images.device),
        )
        final = {name: part for name, part in losses.items() if not name.startswith("block_")}
        blocks = [part for name, part in losses.items() if name.startswith("block_")]
        ratio = self._fp_ratio(out, matching, targets)
        return {**final, "blocks": torch.stack(blocks).sum(), "fp_ratio": ratio}

    @torch.no_grad()
    def _fp_ratio(self, out: Relaxed, matching: Matching, targets: Targets) -> Tensor:
        """Of the last block, whose masks are relaxed if any are, at its own stride."""
        block, step = out.blocks[-1], STRIDES[2] // STRIDES[3]
        masks = block.masks
        if len(out.block_semantic) == len(out.blocks):
            masks = remask(masks, block.classes, out.block_semantic[-1], self.loss.mask_id)
        small = Targets(
            targets.masks[..., ::step, ::step], targets.classes, targets.semantic[..., ::step, ::step]
        )
        return false_positive_ratio(masks, matching, small)

    def measure(self, network: nn.Module, shard: Shard) -> dict[str, float]:
        """PQ in per cent, and its parts, on the validation images at their own size."""
        source = Source(network, self.card)  # type: ignore[arg-type]
        part = replace(self.val, images=tuple(shard.of(self.val.images)))
        report = panoptic.evaluate(
            Network(self.card, source.predict, lambda: None),
            part,
            merge=lambda counts: shard.add(torch.from_numpy(counts)).cpu().numpy(),
        )
        return {self.metric: report.all.pq, "sq": report.all.sq, "rq": report.all.rq, "miou": report.miou}


def _on_device(generator: Generator, device: torch.device) -> Generator:
    """A generator on the device, seeded by the host's one; on a CPU that one itself.

    A loss draws a number for each pixel: drawn on the host, a GPU would wait for them and their copy.
    """
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return Generator(device).manual_seed(seed)


def _read_splits(data: Path) -> tuple[PanopticSet, PanopticSet]:
    """The splits to train on and to measure on, which is the same one where there is no other."""
    names = list(find_splits(data))
    train = [name for name in names if name.startswith("train")] or names
    val = [name for name in names if name.startswith("val")] or train
    if len(train) != 1 or len(val) != 1:
        raise BadInput(f"{data} has the splits {', '.join(names)}; wanted are one train* and one val*")
    first, second = read_split(data, train[0]), read_split(data, val[0])
    if [(c.id, c.name) for c in first.categories] != [(c.id, c.name) for c in second.categories]:
        raise BadInput(f"{first.source} and {second.source} have different categories")
    return first, second


def _readable(val: PanopticSet, numbers: dict[int, int]) -> tuple[PanopticSet, list[str]]:
    """The images to measure on that can be read, with their labels, and notes of the others.

    Raises BadInput where these are over one in a hundred: now, not at the end of a first epoch of hours.
    """
    lost = unreadable(val.images, lambda image: _load(image, numbers))
    check_readable(len(lost), len(val.images), "validation images", lost.values())
    images = tuple(image for i, image in enumerate(val.images) if i not in lost)
    return replace(val, images=images), [f"validation image left out: {reason}" for reason in lost.values()]


def _card(config: TrainConfig, train: PanopticSet, val: PanopticSet) -> ModelCard:
    categories = train.categories
    model = configure(config.model, {"num_classes": len(categories), **config.options})
    if model.num_classes != len(categories):
        raise BadRequest(
            f"num_classes is {model.num_classes}, but the data has {len(categories)}; leave it out"
        )
    labels = Labels(
        tuple(category.name for category in categories),
        tuple(str(category.id) for category in categories),
        tuple(category.thing for category in categories),
    )
    card = run_card(config.model, model, labels)
    counts = {"train_images": len(train.images), "val_images": len(val.images)}
    return replace(card, provenance={**card.provenance, **training_provenance(config), **counts})


def _fingerprint(data: Path, splits: list[PanopticSet]) -> str:
    paths = {path for split in splits for i in split.images for path in (split.source, i.file, i.mask)}
    return listing_sha256(data, sorted(paths))


def _load(image: PanopticImage, numbers: dict[int, int]) -> Scene:
    pixels, ids = read_image(image.file), read_ids(image.mask)
    if pixels.shape[:2] != ids.shape:
        raise BadInput(f"{image.file} is {pixels.shape[:2]} pixels, its segments {image.mask} {ids.shape}")
    known, inverse = np.unique(ids, return_inverse=True)
    place = {segment.id: i for i, segment in enumerate(image.segments, start=1)}
    if stray := [int(i) for i in known if i and int(i) not in place]:
        raise BadInput(f"{image.mask} holds the ids {stray[:5]}, which its JSON does not name")
    if absent := sorted(place.keys() - set(known.tolist())):
        raise BadInput(f"{image.mask} lacks the ids {absent[:5]}, which its JSON names")
    lookup = np.array([place.get(int(i), 0) for i in known], np.int32)
    classes = np.array([-1, *(numbers[s.category_id] for s in image.segments)], np.int64)
    instances = np.array([False, *(not s.crowd for s in image.segments)])
    return Scene(pixels, lookup[inverse].reshape(ids.shape), classes, instances)


def jittered(scene: Scene, size: int, config: TrainConfig, rng: np.random.Generator) -> Scene:
    """The scene scaled, mirrored and cropped to (size, size); what it does not fill is void, and grey."""
    height, width = scene.numbers.shape
    factor = rng.uniform(config.scale_min, config.scale_max) * size / max(height, width)
    tall, wide = (max(1, round(side * factor)) for side in (height, width))
    pixels = np.asarray(Image.fromarray(scene.pixels).resize((wide, tall), Image.Resampling.BILINEAR))
    numbers = np.asarray(Image.fromarray(scene.numbers).resize((wide, tall), Image.Resampling.NEAREST))
    if rng.random() < config.flip:
        pixels, numbers = pixels[:, ::-1], numbers[:, ::-1]
    top, left = (int(rng.integers(max(side - size, 0) + 1)) for side in (tall, wide))
    canvas = np.full((size, size, 3), 128, np.uint8)
    ground = np.zeros((size, size), np.int32)
    part = numbers[top : top + size, left : left + size]
    canvas[: part.shape[0], : part.shape[1]] = pixels[top : top + size, left : left + size]
    ground[: part.shape[0], : part.shape[1]] = part
    return Scene(canvas, ground, scene.classes, scene.instances)


def paste(scene: Scene, other: Scene, things: NDArray[np.bool_], rng: np.random.Generator) -> Scene:
    """Panoptic copy-paste: about half of the other scene's things, pasted over this one."""
    chosen = other.instances & (rng.random(len(other.classes)) < 0.5)
    chosen[1:] &= things[other.classes[1:]]
    where = chosen[other.numbers]
    offset = len(scene.classes) - 1
    numbers = np.where(where, other.numbers + offset, scene.numbers).astype(np.int32)
    return Scene(
        np.where(where[..., None], other.pixels, scene.pixels),
        numbers,
        np.concatenate([scene.classes, other.classes[1:]]),
        np.concatenate([scene.instances, other.instances[1:]]),
    )


def _collate(scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
    step = STRIDES[-1]
    most = max(len(scene.classes) for scene in scenes)

    def filled(values: NDArray[Any], empty: Any) -> NDArray[Any]:
        return np.pad(values, (0, most - len(values)), constant_values=empty)

    arrays = (
        np.stack([scene.pixels for scene in scenes]),
        # Sub-sampled, not averaged: the corners of the two maps fall on each other.
        np.stack([scene.numbers[::step, ::step] for scene in scenes]).astype(np.int64),
        np.stack([filled(scene.classes, -1) for scene in scenes]),
        np.stack([filled(scene.instances, False) for scene in scenes]),
    )
    return tuple(torch.from_numpy(array) for array in arrays)


def _targets(numbers: Tensor, classes: Tensor, instances: Tensor) -> Targets:
    """(B, h, w) segment numbers with (B, S + 1) classes and instances -> the ground truth of a batch."""
    count = classes.shape[1]
    masks = numbers.unsqueeze(1) == torch.arange(1, count, device=numbers.device).reshape(-1, 1, 1)
    semantic = classes.gather(1, numbers.flatten(1)).view_as(numbers)
    owned = instances[:, 1:]
    return Targets(masks & owned[..., None, None], torch.where(owned, classes[:, 1:], -1), semantic)
