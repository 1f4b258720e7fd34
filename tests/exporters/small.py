"""Small torch networks of tasks that have no family of models, as sources of exports."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.exporters.source import Source
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec

LABELS = ("road", "car", "sky", "tree")


class Segmenter(nn.Module):
    """Logits at a quarter of the input's size, and those of an auxiliary head if `auxiliary`."""

    float_modules: tuple[str, ...] = ()

    def __init__(self, auxiliary: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Conv2d(24, len(LABELS), 1)
        self.auxiliary = nn.Conv2d(16, len(LABELS), 1) if auxiliary else None
        self.output_names = ("logits", "auxiliary") if auxiliary else ("logits",)

    def deploy(self, images: Tensor) -> tuple[Tensor, ...]:
        wide = torch.relu(self.stem(images))
        # Sure of itself, as a trained network is.
        logits = 8 * self.head(torch.relu(self.body(wide)))
        return (logits,) if self.auxiliary is None else (logits, self.auxiliary(wide))

    forward = deploy

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        return {}


class Detector(nn.Module):
    """Boxes, scores and the best class of every place, without any choice among the boxes."""

    float_modules: tuple[str, ...] = ()
    output_names = ("boxes", "scores", "best")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=4, padding=1)
        self.body = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.boxes = nn.Conv2d(32, 4, 1)
        self.classes = nn.Conv2d(32, 5, 1)

    def deploy(self, images: Tensor) -> tuple[Tensor, ...]:
        wide = torch.relu(self.body(torch.relu(self.stem(images))))
        boxes, classes = (head(wide).flatten(2).transpose(1, 2) for head in (self.boxes, self.classes))
        return 64 * boxes.sigmoid(), 9 * classes, classes.argmax(-1)

    forward = deploy

    def decisions(self, images: Tensor) -> dict[str, Tensor]:
        return {}


def source(module: nn.Module, task: str, size: int = 64) -> Source:
    """A network of random weights, the same at every call, with the card of its run."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        for parameter in module.parameters():
            # Biases are small, or one class would win everywhere.
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.copy_(scale * torch.randn(parameter.shape))
        found = module.eval()(torch.zeros(1, 3, size, size))
    outputs = tuple(
        TensorSpec(name, (None, *value.shape[1:]), str(value.dtype).removeprefix("torch."))
        for name, value in zip(module.output_names, found, strict=True)
    )
    card = ModelCard(
        name=type(module).__name__.lower(),
        task=task,
        target="torch",
        precision="fp32",
        inputs=(TensorSpec("image", (None, 3, size, size), "float32"),),
        outputs=outputs,
        image=ImageSpec(
            (size, size), fit="stretch", interpolation="bilinear", layout="NCHW", dtype="float32"
        ),
        labels=LABELS if task == "semantic" else (),
        decode={"logits": "logits"} if task == "semantic" else {},
    )
    return Source(module, card)
