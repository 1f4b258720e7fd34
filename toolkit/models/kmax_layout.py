"""Names of tensors in the checkpoints of kMaX-DeepLab's PyTorch port.

MobileNetV3, for which the port has no public names, has timm's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vitkit.models.family import Layout, Place
from vitkit.models.remax import ReMaXConfig

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


def _place(config: ReMaXConfig, key: str, shape: tuple[int, ...]) -> Place:
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


LAYOUT = Layout(
    _place,
    heads=r".*\.class_head\..*",
    void=1,
    training=r"criterion\.|sem_seg_head\.predictor\._auxiliary_semantic_predictor\.",
)
