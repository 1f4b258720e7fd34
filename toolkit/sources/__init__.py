"""Networks from outside: `resolve` turns a word, such as `timm:NAME` or `model.pt2`, into a float source."""

import vitkit.calibration.openmp  # noqa: F401  (before torch)
from vitkit.sources.card_values import CardValues, build_card, read_card_values
from vitkit.sources.resolve import check_word, parse_word, resolve

__all__ = ["CardValues", "build_card", "check_word", "parse_word", "read_card_values", "resolve"]
