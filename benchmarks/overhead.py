"""What vitkit adds: to a raw vendor session, to `import numpy`, to starting Python; and the wheel's size.

    python benchmarks/overhead.py

Times are medians, taken in turns with what they are compared to.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

import vitkit
from vitkit import exporters
from vitkit.exporters.source import Source
from vitkit.runs import untrained_run

ROOT = Path(__file__).resolve().parents[1]


def in_turns(first: Callable[[], object], second: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median seconds of two calls, taken in turns, the order changing every time."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(runs + 20):
        for which in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            if i >= 20:
                times[which].append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


def onnx_raw(path: Path) -> Callable[[dict[str, np.ndarray]], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options)
    return lambda feeds: session.run(None, feeds)


def openvino_raw(path: Path) -> Callable[[dict[str, np.ndarray]], object]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path / "model.xml", "CPU", settings).create_infer_request()
    return request.infer


def sessions() -> None:
    run = untrained_run("ps_vit_nano", {})
    source = Source(run.model, run.card)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for target, raw in (("onnx", onnx_raw), ("openvino", openvino_raw)):
            for kind in exporters.INPUTS:
                path = Path(name) / f"{target}-{kind}"
                exporters.export(source, path, target=target, precision="fp32", input=kind)
                with vitkit.open_engine(path, threads=1) as engine:
                    spec = engine.card.inputs[0]
                    feeds = {spec.name: rng.integers(0, 256, spec.shape).astype(spec.dtype)}
                    call = raw(path)
                    ours, theirs = in_turns(lambda: engine.run(feeds), lambda: call(feeds), 500)  # noqa: B023
                added = f"{1e6 * (ours - theirs):+.1f} us on {1e6 * theirs:.0f} us"
                print(f"engine.run, {target}, {kind} input: {added}")


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def starts() -> None:
    code = {"vitkit.runtimes": "import vitkit.runtimes", "numpy": "import numpy"}
    ours, theirs = in_turns(
        lambda: python("-c", code["vitkit.runtimes"]), lambda: python("-c", code["numpy"]), 15
    )
    print(f"import vitkit.runtimes over import numpy: {1e3 * (ours - theirs):+.0f} ms")
    command = str(Path(sys.executable).with_name("vitkit"))
    ours, theirs = in_turns(
        lambda: subprocess.run([command, "--help"], check=True, capture_output=True),
        lambda: python("-c", "pass"),
        15,
    )
    print(f"vitkit --help over python -c pass: {1e3 * (ours - theirs):+.0f} ms")


def wheel() -> None:
    with tempfile.TemporaryDirectory() as folder:
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT))
        (path,) = Path(folder).glob("*.whl")
        print(f"wheel: {path.stat().st_size / 1e6:.3f} MB")


if __name__ == "__main__":
    sessions()
    starts()
    wheel()
