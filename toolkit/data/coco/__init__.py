"""COCO's panoptic format: reading, checking, writing."""
