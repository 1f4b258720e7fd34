"""`vitkit bench --max-isa`: OpenVINO limited to the instruction set of a lesser CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from vitkit.bench.cpu import cpu_info
from vitkit.runtimes.card import read_card
from vitkit.runtimes.errors import BadRequest

# By the name of the cap: what OpenVINO's kernels call it, and the CPU feature without which it is no cap.
ISAS = {
    "avx2": ("AVX2", "avx2"),
    "avx2_vnni": ("AVX2_VNNI", "avx_vnni"),
    "avx512_vnni": ("AVX512_CORE_VNNI", "avx512_vnni"),
}
# The kernels read the first, some versions the second.
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def check_isa(isa: str, artifacts: Iterable[Path]) -> None:
    """Raises BadRequest for an artifact whose engine ignores a cap, which is every target but openvino."""
    for path in artifacts:
        if (target := read_card(path).target) != "openvino":
            raise BadRequest(
                f"--max-isa {isa} works for openvino, and {path} is compiled for {target}, whose engine "
                "always uses all that the CPU has; leave it out, or export it with --target openvino"
            )


def cap_isa(isa: str, artifacts: Iterable[Path]) -> None:
    """Let OpenVINO use no more than the instructions `isa` (a key of `ISAS`) from now on in this process.

    Raises BadRequest for what `check_isa` refuses, if this CPU lacks the instructions itself, and if
    OpenVINO is loaded already, because it reads the cap once.
    """
    check_isa(isa, artifacts)
    name, feature = ISAS[isa]
    features = cpu_info()["features"] or []
    if feature not in features:
        raise BadRequest(
            f"this CPU has no {feature}, so it cannot show what --max-isa {isa} would do; "
            f"it has {', '.join(features) or 'none of the known features'}"
        )
    if "openvino" in sys.modules:
        raise BadRequest("OpenVINO is loaded in this process and ignores a cap; use: vitkit bench --max-isa")
    for variable in _VARIABLES:
        os.environ[variable] = name
