"""Networks from outside: `resolve` turns a word, such as `timm:NAME` or `model.pt2`, into a float source."""

import vitkit.calibration.openmp  # noqa: F401  (before torch)
