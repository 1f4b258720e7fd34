"""Sixty families of timm, one small member each, through every target that runs on a CPU.

    python benchmarks/families.py [NAME ...] [--targets onnx openvino tflite] [--precisions fp32 int8]
        [--images DIR] [--results FILE.jsonl] [--table FILE.md]

Each network runs in a process of its own and adds a line to the results for each engine; what is there
already is not run again. Weights are random and made alive, see `awake`. An engine that does not do what the
network does is refused by the export, with its reason; anything but such a refusal is a fault.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

FAMILIES = {
    "CNN": (
        *(
            "mobilenetv1_100",
            "mobilenetv2_050",
            "mobilenetv3_small_100",
            "mobilenetv4_conv_small",
            "lcnet_050",
        ),
        *("efficientnet_lite0", "efficientnet_b0", "mnasnet_small", "ghostnet_050", "ghostnetv3_050"),
        *("hardcorenas_a", "rexnet_100", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "fasternet_t0"),
        *("starnet_s050", "hgnetv2_b0", "regnety_002", "resnet18", "resnetv2_18", "resnest14d", "skresnet18"),
        *("densenet121", "dla46_c", "dpn48b", "ese_vovnet19b_slim_dw", "hrnet_w18_small", "cs3darknet_s"),
        *("nf_regnet_b0", "convnext_atto", "convnextv2_atto", "inception_next_atto", "mambaout_femto"),
    ),
    "ViT": (
        *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "pit_ti_224"),
        *("cait_xxs24_224", "convit_tiny", "crossvit_tiny_240", "xcit_nano_12_p16_224"),
    ),
    "window or pyramid": (
        *("swin_tiny_patch4_window7_224", "gcvit_xxtiny", "pvt_v2_b0", "tiny_vit_5m_224"),
        "coatnet_pico_rw_224",
    ),
    "hybrid": (
        *("coat_lite_tiny", "edgenext_xx_small", "efficientformerv2_s0", "efficientvit_b0", "fastvit_t8"),
        *("efficientvit_m0", "levit_128s", "mobilevit_xxs", "mobilevitv2_050", "shvit_s1"),
    ),
    "mixer": ("mixer_s32_224", "gmlp_ti16_224", "poolformer_s12"),
}
NAMES = tuple(name for names in FAMILIES.values() for name in names)
# Exported by tests: one of each kind, and what faults came from.
TESTED = (
    *("mobilenetv4_conv_small", "repvit_m0_9", "convnextv2_atto", "vit_tiny_patch16_224", "pvt_v2_b0"),
    *("mobilevitv2_050", "gmlp_ti16_224"),
)
TARGETS, PRECISIONS = ("onnx", "openvino", "tflite"), ("fp32", "int8")


def awake(network: Any, images: Any) -> None:
    """Give an untrained network what training would: scales let signals through, norms fit their inputs.

    Scales that start at zero, or at 1e-6, would hide all that lies behind them. `images` are normalised
    (N, 3, H, W); batch norms take their statistics.
    """
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(like: Any) -> Any:
        return torch.randn(like.shape, generator=generator)

    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.1 * random(parameter))
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.25 * random(parameter))
            elif name.endswith("weight"):
                parameter.copy_(random(parameter) * parameter[0].numel() ** -0.5)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        network(images)
        for norm in norms:
            # What hardly differs from image to image, such as pooled features, would be blown up to noise.
            norm.running_var.copy_(torch.maximum(norm.running_var, 0.01 * norm.running_mean.square()))
    network.eval()


def family_source(name: str) -> Any:
    """The source of an untrained timm network, made as `vitkit export timm:NAME --untrained` does, awake."""
    import torch

    from vitkit.runtimes.image import generated_photos, prepare_batch
    from vitkit.sources import CardValues, resolve

    source = resolve(f"timm:{name}", CardValues(), untrained=True)
    awake(
        source.module.network, torch.from_numpy(prepare_batch(generated_photos(8, seed=3), source.card.image))
    )
    return source


def run_family(name: str, targets: Sequence[str], precisions: Sequence[str], images: Path) -> Iterator[Any]:
    """A row for each engine of a family: its error and INT8's speed-up, or why it was refused."""
    from vitkit.calibration.dataset import calibration_set

    source, calibration = family_source(name), calibration_set(images, 32)
    size = sum(weight.numel() for weight in source.module.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as work:
        for target in targets:
            folders = {precision: Path(work) / f"{target}-{precision}" for precision in precisions}
            for precision, folder in folders.items():
                given = calibration if precision == "int8" else None
                found = run_export(source, folder, target, precision, given, images)
                if precision == "int8" and all((made / "card.json").exists() for made in folders.values()):
                    found["speedup"] = speedup(*folders.values())
                yield {"name": name, "size": size, "target": target, "precision": precision, **found}


def run_export(
    source: Any, folder: Path, target: str, precision: str, calibration: Any, images: Path
) -> dict[str, Any]:
    """Error and agreement of one engine; under `refused` or `fault` the reason why there is none."""
    from vitkit.exporters import export
    from vitkit.runtimes.errors import VitkitError
    from vitkit.runtimes.image import sample_photos

    compared = sample_photos(images, 32)
    try:
        artifact, checks = export(
            source, folder, target=target, precision=precision, calibration=calibration, images=compared
        )
    except VitkitError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    # A fault must not hide the other engines of its family.
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {error}"}
    found = checks[-1].summary()
    scheme = artifact.card.provenance.get("int8_scheme", "")
    return {"error": found["logits_error"], "agreement": found["top1_agreement"], "scheme": scheme}


def speedup(slow: Path, fast: Path) -> float:
    """How many times faster one engine is than another, by the medians of one thread."""
    from vitkit.bench import BenchOptions, bench

    options = BenchOptions(threads=1, duration=1.0, scopes=("engine",))
    medians = [sorted(report.times_ns)[report.n // 2] for report in bench([slow, fast], options)]
    return medians[0] / medians[1]


HEAD = """# Families of timm

    python benchmarks/families.py

One small member of each family, random weights made alive, on generated images. In a cell: the root mean
square error of the logits over their standard deviation; for INT8 also the share of images with the same
class, and the speed-up over the same target's float engine on one thread. Numbers in brackets are reasons.
"""


def write_table(rows: Sequence[Any], file: Path) -> None:
    """All results as a page: a line for each family, and every refusal with its reason."""
    columns = [(target, precision) for target in TARGETS for precision in PRECISIONS]
    found = {(row["name"], row["target"], row["precision"]): row for row in rows}
    sizes = {name: max((row["size"] for row in rows if row["name"] == name), default=None) for name in NAMES}
    reasons: list[str] = []
    lines = [
        HEAD,
        f"| family | kind | M parameters | {' | '.join(' '.join(column) for column in columns)} |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for kind, names in FAMILIES.items():
        for name in names:
            if sizes[name] is not None:
                cells = [_cell(found.get((name, *column)), reasons) for column in columns]
                lines.append(f"| {name} | {kind} | {sizes[name]:.1f} | {' | '.join(cells)} |")
    results = [[row for row in found.values() if (row["target"], row["precision"]) == c] for c in columns]
    passed = [f"{sum('error' in row for row in column)} of {len(column)}" for column in results]
    lines.append(f"| passed | | | {' | '.join(passed)} |")
    if reasons:
        lines += ["", "## Refusals", "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(row: Any, reasons: list[str]) -> str:
    if row is None:
        return "-"
    if "error" not in row:
        kind = "refused" if "refused" in row else "fault"
        reasons.append(f"{row['name']}, {row['target']} {row['precision']}: {row[kind]}")
        return f"{kind} [{len(reasons)}]"
    if row["precision"] == "fp32":
        return f"{row['error']:.0e}"
    faster = f", x{row['speedup']:.2f}" if "speedup" in row else ""
    return f"{row['error']:.3f}, {row['agreement']:.0%}{faster}"


def _photo_folder(folder: Path) -> Path:
    from PIL import Image

    from vitkit.runtimes.image import generated_photos

    for i, photo in enumerate(generated_photos(64, seed=1)):
        Image.fromarray(photo).save(folder / f"{i:02}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument("--images", type=Path, help="folder to calibrate and compare on (generated images)")
    parser.add_argument("--results", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        with given.results.open("a", encoding="utf-8") as file:
            for row in run_family(given.names[0], given.targets, given.precisions, given.images):
                print(json.dumps(row), file=file, flush=True)
        return
    with tempfile.TemporaryDirectory() as work:
        images = given.images or _photo_folder(Path(work))
        for name in given.names:
            _run_apart(name, given, images)
    if given.table:
        write_table(_read(given.results), given.table)


def _read(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _run_apart(name: str, given: argparse.Namespace, images: Path) -> None:
    """Run what is missing of a family in a process of its own; a crash there is a fault of the engine."""

    def missing() -> list[tuple[str, str]]:
        done = {(row["name"], row["target"], row["precision"]) for row in _read(given.results)}
        return [(t, p) for t in given.targets for p in given.precisions if (name, t, p) not in done]

    targets = list(dict.fromkeys(target for target, _ in missing()))
    if not targets:
        return
    command = [sys.executable, __file__, name, "--inside", "--targets", *targets]
    command += ["--precisions", *given.precisions, "--images", str(images), "--results", str(given.results)]
    ended = subprocess.run(command).returncode
    with given.results.open("a", encoding="utf-8") as file:
        for target, precision in missing():
            row = {"name": name, "size": 0.0, "target": target, "precision": precision}
            print(json.dumps({**row, "fault": f"the process ended with {ended}"}), file=file)


if __name__ == "__main__":
    main()
