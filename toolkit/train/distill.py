"""Knowledge distillation: a classifier learns from another one's answers beside the labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.models.state import read_tensors
from vitkit.runs import load_run
from vitkit.runtimes.card import ImageSpec, ModelCard
from vitkit.runtimes.errors import BadRequest
from vitkit.torchvision_shim import from_timm, timm

_TIMM = "timm:"


class Teacher:
    """A trained classifier of the same classes, asked about a student's training images.

    `source` is a run's folder, or timm:NAME for a network of timm with its pretrained weights, or
    timm:NAME=FILE with weights in a file. Raises BadRequest for a teacher that there is not or that knows
    other classes than the student's card, and what reading its weights raises.
    """

    def __init__(self, source: str, student: ModelCard) -> None:
        self.student = student.image
        if source.startswith(_TIMM):
            self.network, self.image = _from_timm(source.removeprefix(_TIMM), len(student.labels))
        else:
            run = load_run(Path(source))
            if run.card.labels != student.labels:
                raise BadRequest(
                    f"the teacher {source} knows {_few(run.card.labels)}; the data has {_few(student.labels)}"
                )
            self.network, self.image = run.model, run.card.image
        self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images as the student sees them -> the teacher's logits (B, classes)."""
        self.network.to(images.device)
        pixels = images * _row(self.student.std, images) + _row(self.student.mean, images)
        if images.shape[2:] != self.image.size:
            pixels = F.interpolate(
                pixels, self.image.size, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 1)
        seen = (pixels - _row(self.image.mean, images)) / _row(self.image.std, images)
        answer: Tensor = self.network(seen)
        return answer.float()


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """How far a student's logits (B, classes) are from its teacher's, mean over the batch.

    `soft`: the Kullback-Leibler divergence of their probabilities at a temperature, times its square, so
    that gradients keep their size. `hard`: the cross-entropy with the teacher's best class.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    own = F.log_softmax(logits.float() / temperature, 1)
    wanted = F.log_softmax(teacher / temperature, 1)
    return F.kl_div(own, wanted, reduction="batchmean", log_target=True) * temperature**2


def _from_timm(text: str, classes: int) -> tuple[nn.Module, ImageSpec]:
    name, _, file = text.partition("=")
    with from_timm(
        f"the teacher timm:{text} cannot be had", "With weights in a file: teacher=timm:NAME=FILE"
    ):
        network = timm.create_model(name, pretrained=not file, **({"num_classes": classes} if file else {}))
        if file:
            network.load_state_dict(read_tensors(Path(file), network.state_dict()))
    if network.num_classes != classes:
        raise BadRequest(
            f"the teacher timm:{name} knows {network.num_classes} classes, the data has {classes}; name the "
            f"weights of one that knows these: teacher=timm:{name}=FILE"
        )
    known = timm.data.resolve_model_data_config(network)
    height, width = known["input_size"][1:]
    return network, ImageSpec(
        (height, width), mean=tuple(known["mean"]), std=tuple(known["std"]), layout="NCHW", dtype="float32"
    )


def _row(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).reshape(1, 3, 1, 1)


def _few(labels: tuple[str, ...]) -> str:
    more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
    return f"the classes {', '.join(labels[:3])}{more}"
