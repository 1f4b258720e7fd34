"""Reading other people's checkpoints into vitkit's models, without unpickling code."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vitkit.models import build, configure
from vitkit.models.ps_vit import PSViTConfig
from vitkit.models.remax import ReMaXConfig
from vitkit.runtimes.errors import BadInput, BadRequest

if TYPE_CHECKING:
    from torch import Tensor

    from vitkit.models import Config, Model

    Tensors = Mapping[str, Tensor]

Shape = tuple[int, ...]

# Where checkpoints keep the weights beside optimiser states and epochs.
_NESTS = ("model", "state_dict")
_DEPTH = 4
# A message names this many of the tensors that are wrong.
_SHOWN = 20


class Place(NamedTuple):
    """Where a layout keeps one of our tensors: under each of `names` the same, in this `shape`.

    A `flipped` matrix has our rows as columns; otherwise the shape differs from ours by 1s at the end.
    """

    names: tuple[str, ...]
    shape: Shape
    flipped: bool = False


@dataclass(frozen=True)
class Layout:
    """How somebody names the tensors of the models that have a `config` of this type.

    `place` finds our tensor of a name and shape. `heads` matches our names of the tensors that have a row
    for every class, and `void` rows more. `training` matches their names of what only training needs;
    `spare` gives other tensors of theirs that ours do without, with their shapes.
    """

    config: type[Config]
    place: Callable[[Any, str, Shape], Place]
    heads: str
    void: int = 0
    training: str = r"(?!)"
    spare: Callable[[Any], dict[str, Shape]] = lambda config: {}


class Imported(NamedTuple):
    """A model with the weights of a checkpoint, in eval mode.

    `reset` are the model's layers that were left fresh, `ignored` the checkpoint's tensors that only
    training needs.
    """

    model: Model
    reset: tuple[str, ...]
    ignored: tuple[str, ...]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth`-style or `.safetensors` file: plain, or nested under `model`/`state_dict`.

    A `module.` prefix on every name is dropped. Raises BadInput where the file is missing, damaged, holds
    no weights, or would need code to be run.
    """
    if not path.is_file():
        raise BadInput(f"the checkpoint {path} does not exist or is not a file")
    body = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for _ in range(_DEPTH):
        if not isinstance(body, Mapping) or _is_state_dict(body):
            break
        nested = next((body[key] for key in _NESTS if isinstance(body.get(key), Mapping)), None)
        if nested is None:
            found = ", ".join(map(str, list(body)[:8])) or "nothing"
            raise BadInput(f"{path} holds no weights: neither tensors nor {' or '.join(_NESTS)}, but {found}")
        body = nested
    if not isinstance(body, Mapping) or not _is_state_dict(body):
        raise BadInput(f"{path} holds a {type(body).__name__}; a checkpoint is a dictionary of tensors")
    prefix = "module." if all(name.startswith("module.") for name in body) else ""
    return {name[len(prefix) :]: tensor for name, tensor in body.items()}


def _is_state_dict(body: Mapping[Any, Any]) -> bool:
    import torch

    return bool(body) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in body.items())


def _read_torch(path: Path) -> Any:
    import torch

    try:
        # timm keeps the command line as a Namespace; it holds data only.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it needs {wanted[1]}" if wanted else "it is damaged or holds more than tensors"
        raise BadInput(
            f"{path} cannot be read without running its code ({what}); save the weights alone, with: "
            "torch.save(model.state_dict(), FILE)"
        ) from None
    # Damaged files surface as RuntimeError, EOFError, KeyError, ValueError, UnicodeDecodeError and more.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise BadInput(f"{path} cannot be read as a checkpoint, it is damaged or foreign: {reason}") from None


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} cannot be read as safetensors: {error}") from None


def load_checkpoint(
    path: Path, layout: str, name: str, options: Mapping[str, Any], *, reset_head: bool = False
) -> Imported:
    """The model `name` with the weights of a checkpoint in one of LAYOUTS.

    `reset_head` leaves the layers that depend on the number of classes as they are made, the same every
    time. Raises BadRequest for a bad layout, model or option; BadInput for weights of another number of
    classes, and naming every tensor that is missing, extra, misshapen, no weight, or differs between the
    places in which the layout repeats it.
    """
    import torch

    config = configure(name, options)
    theirs = _layout(layout, name, config)
    tensors = read_tensors(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(name, **options)
    state = model.state_dict()
    places = {key: theirs.place(config, key, tuple(tensor.shape)) for key, tensor in state.items()}
    heads = {key: place for key, place in places.items() if re.fullmatch(theirs.heads, key)}
    problems = [] if reset_head else _class_problems(tensors, heads.values(), theirs, config.num_classes)
    if reset_head or problems:
        left = {key for key, place in heads.items() if reset_head or place.names[0] in tensors}
        tensors = _without(tensors, {source for key in left for source in heads[key].names})
        places = {key: place for key, place in places.items() if key not in left}
    ignored = tuple(source for source in tensors if re.match(theirs.training, source))
    tensors = _without(tensors, set(ignored))
    problems += _problems(tensors, places, theirs.spare(config))
    if problems:
        raise BadInput(f"{path} does not hold a {name}: {listed(problems)}")
    with torch.no_grad():
        for key, place in places.items():
            found = next((tensors[source] for source in place.names if source in tensors), None)
            if found is not None:
                state[key].copy_(found.T if place.flipped else found.reshape(state[key].shape))
    reset = dict.fromkeys(key.rpartition(".")[0] for key in heads) if reset_head else ()
    return Imported(model.eval(), tuple(reset), ignored)


def _layout(layout: str, name: str, config: Config) -> Layout:
    if layout not in LAYOUTS:
        raise BadRequest(f"there is no checkpoint format {layout!r}; the formats are {', '.join(LAYOUTS)}")
    if not isinstance(config, LAYOUTS[layout].config):
        fitting = next(key for key, other in LAYOUTS.items() if isinstance(config, other.config))
        raise BadRequest(f"a checkpoint of the format {layout!r} holds no {name}, use --format {fitting}")
    return LAYOUTS[layout]


def _without(tensors: Tensors, names: set[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def listed(problems: Sequence[str]) -> str:
    """Problems in one line, the first twenty of them by name."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _class_problems(tensors: Tensors, heads: Iterable[Place], layout: Layout, classes: int) -> list[str]:
    """What to do about a checkpoint whose heads agree on another number of classes; nothing otherwise."""
    counts = set()
    for place in heads:
        if (tensor := tensors.get(place.names[0])) is not None:
            fits = tensor.ndim > 0 and tuple(tensor.shape[1:]) == place.shape[1:]
            counts.add(len(tensor) - layout.void if fits else 0)
    count = counts.pop() if len(counts) == 1 else 0
    if count < 1 or count == classes:
        return []
    return [
        f"its heads are for {count} classes, the model's for {classes} (add --option num_classes={count} to "
        "keep its classes, or --reset-head to give the model a fresh head)"
    ]


def _problems(tensors: Tensors, places: Mapping[str, Place], spare: Mapping[str, Shape]) -> list[str]:
    import torch

    problems = []
    expected = dict(spare)
    for key, place in places.items():
        expected.update(dict.fromkeys(place.names, place.shape))
        present = [source for source in place.names if source in tensors]
        # The batch counter is no weight, and formats that store a shared tensor once drop its other names.
        if not present and not key.endswith("num_batches_tracked"):
            problems.append(f"{place.names[0]} is missing")
        for source in present[1:]:
            if not trouble(source, tensors[source]) and not torch.equal(tensors[source], tensors[present[0]]):
                problems.append(f"{source} differs from {present[0]}, with which the model shares it")
    for source, tensor in tensors.items():
        if source not in expected:
            problems.append(f"{source} is extra")
        elif tuple(tensor.shape) != expected[source]:
            problems.append(f"{source} is {list(tensor.shape)}, not {list(expected[source])}")
        elif reason := trouble(source, tensor):
            problems.append(f"{source} {reason}")
    return problems


def trouble(name: str, tensor: Tensor) -> str | None:
    """Why a tensor is no weight, or None; `name` tells counters and variances."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return "is no plain tensor (sparse, quantised, nested or without data)"
    if name.endswith("num_batches_tracked"):
        return None
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not a float"
    if not torch.isfinite(tensor.float()).all():
        return "holds NaN or infinite values"
    if name.endswith("running_var") and (tensor < 0).any():
        return "is negative; a variance cannot be"
    return None


def _psvit_place(config: PSViTConfig, key: str, shape: Shape) -> Place:
    theirs = re.sub(r"\.mlp\.([03])\.", lambda m: f".mlp.fc{1 if m[1] == '0' else 2}.", key)
    if match := re.fullmatch(r"sampler\.pos_layer\.(.+)", theirs):
        aliases = (f"ps_layers.{t}.position_layer.{match[1]}" for t in range(config.iterations))
        return Place((f"pos_layer.{match[1]}", *aliases), shape)
    if match := re.fullmatch(r"sampler\.layers\.(\d+)\.(.+)", theirs):
        iterations = range(config.iterations) if config.share else [int(match[1])]
        return Place(tuple(f"ps_layers.{t}.transformer_layer.{match[2]}" for t in iterations), shape)
    if match := re.fullmatch(r"sampler\.offset_layers\.(\d+)\.(.+)", theirs):
        return Place((f"ps_layers.{match[1]}.offset_layer.{match[2]}",), shape)
    return Place((re.sub(r"^encoder\.", "trans_layers.", theirs),), shape)


# Our names in the pixel decoder -> those of the authors' PyTorch port of kMaX-DeepLab.
_PIXEL_DECODER = {
    "norms": "_in_norms",
    "fuses": "_resized_fuses",
    "low": "_conv_bn_low",
    "high": "_conv_bn_high",
    "conv1": "_conv1_bn_act",
    "conv2": "_conv2_bn_act",
    "conv3": "_conv3_bn",
    "shortcut": "_shortcut",
    "height": "_attention._height_axis",
    "width": "_attention._width_axis",
    "qkv": "qkv_transform.conv",
    "qkv_norm": "_batch_norm_qkv",
    "similarity_norm": "_batch_norm_similarity",
    "output_norm": "_batch_norm_retrieved_output",
    "query_table": "_query_rpe._embeddings.weight",
    "key_table": "_key_rpe._embeddings.weight",
    "value_table": "_value_rpe._embeddings.weight",
}
# The same of the transformer decoder. `_predcitor` is how they spell it.
_DECODER = {
    "centres": "_cluster_centers.weight",
    "blocks": "_kmax_transformer_layers",
    "class_embedding": "_class_embedding_projection",
    "mask_embedding": "_mask_embedding_projection",
    "linear": "conv",
    "pixel_in": "_pixel_conv1_bn_act",
    "query_in": "_query_conv1_bn_act",
    "value": "_pixel_v_conv_bn",
    "update_norm": "_kmeans_query_batch_norm_retrieved_value",
    "update": "_kmeans_query_conv3_bn",
    "attention.qkv": "_query_qkv_conv_bn",
    "attention.similarity_norm": "_query_self_attention._batch_norm_similarity",
    "attention.value_norm": "_query_self_attention._batch_norm_retrieved_value",
    "attention.out": "_query_conv3_bn",
    "ffn_in": "_query_ffn_conv1_bn_act",
    "ffn_out": "_query_ffn_conv2_bn",
    "predictor": "_predcitor",
    "pixel_depthwise": "_pixel_space_head_conv0bnact",
    "pixel_mix": "_pixel_space_head_conv1bnact",
    "pixel_out": "_pixel_space_head_last_convbn",
    "mask_kernel": "_transformer_mask_head",
    "mask_norm": "_pixel_space_mask_batch_norm",
    "class_head": "_transformer_class_head.conv",
}


def _kmax_place(config: ReMaXConfig, key: str, shape: Shape) -> Place:
    part, _, rest = key.partition(".")
    if part == "backbone":
        return Place(
            (f"backbone.{_resnet_name(rest) if config.backbone.startswith('resnet') else rest}",), shape
        )
    if part == "pixel_decoder":
        rest = re.sub(r"^stages\.(\d+)", r"_stages.\1._blocks", rest)
        # Attention there is over lines, and its products are 1-d convolutions.
        shape = shape[:3] if rest.endswith("qkv.weight") else shape
        return Place((f"sem_seg_head.pixel_decoder.{_translated(rest, _PIXEL_DECODER)}",), shape)
    place = f"sem_seg_head.predictor.{_translated(rest, _DECODER)}"
    if rest == "centres":
        return Place((place,), shape[::-1], flipped=True)
    # So are all products with queries.
    return Place((place,), (*shape, 1) if len(shape) == 2 else shape)


def _translated(name: str, table: Mapping[str, str]) -> str:
    """A dotted name with every whole part, or run of parts, that the table has replaced by the table's."""
    parts = "|".join(map(re.escape, sorted(table, key=len, reverse=True)))
    return re.sub(rf"(?<!\w)({parts})(?!\w)", lambda match: table[match[1]], name)


def _resnet_name(name: str) -> str:
    """detectron2's name of a tensor that timm's ResNet has under `name`."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return re.sub(r"(?<!\w)bn(\d)", r"conv\1.norm", name)


# The authors' layouts. What kMaX-DeepLab's port has no public names for, MobileNetV3, has timm's.
LAYOUTS = {
    "psvit": Layout(
        PSViTConfig,
        _psvit_place,
        heads=r"head\..*",
        spare=lambda config: {"point_coord": (1, config.n**2, 2)},
    ),
    "kmax": Layout(
        ReMaXConfig,
        _kmax_place,
        heads=r".*\.class_head\..*",
        void=1,
        training=r"criterion\.|sem_seg_head\.predictor\._auxiliary_semantic_predictor\.",
    ),
}
