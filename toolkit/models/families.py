"""The families of models: one row each. A new family is a file of its own and a row here."""

from __future__ import annotations

from vitkit.models import kmax_layout, ps_vit, remax
from vitkit.models.family import Family, ModelConfig

FAMILIES = {
    "ps_vit": Family(
        config=ps_vit.PSViTConfig,
        module=ps_vit.PSViT,
        task="classification",
        card=ps_vit.card_parts,
        training="vitkit.train.classification:ClassificationTraining",
        layouts={"psvit": ps_vit.LAYOUT},
    ),
    "remax": Family(
        config=remax.ReMaXConfig,
        module=remax.ReMaX,
        task="panoptic",
        card=remax.card_parts,
        training="vitkit.train.panoptic:PanopticTraining",
        layouts={"kmax": kmax_layout.LAYOUT},
        labels={133: remax.coco_labels},
    ),
}


def family_of(config: ModelConfig) -> Family:
    """The family whose configs are of this type; raises LookupError if there is none."""
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    raise LookupError(f"no family in FAMILIES has configs of the type {type(config).__name__}")
