"""The map of docs/design.md, held: who imports whom, and what is in the wheel."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import tomllib

from vitkit.devices.wheel import runtime_wheel

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"runtimes": 0, "calibration": 1, "exporters": 2, "toolkit": 3}
TORCH_FREE = ("runtimes", "calibration")
VENDORS = {
    "cv2",
    "onnxruntime",
    "openvino",
    "nncf",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ai_edge_litert",
    "ai_edge_quantizer",
    "litert_torch",
    "tflite_runtime",
    "tensorrt",
    "tensorboard",
    "wandb",
    "webdataset",
    "cuda",
}
VENDOR_FILES = {
    "cv2": {"toolkit/pictures/video.py"},
    "onnxruntime": {"runtimes/onnx.py", "calibration/onnx.py"},
    "openvino": {"runtimes/openvino.py", "calibration/openvino.py", "exporters/openvino.py"},
    "nncf": {"calibration/openvino.py"},
    "onnx": {
        "calibration/onnx.py",
        "calibration/tensorrt.py",
        "exporters/onnx.py",
        "exporters/onnx_file.py",
        "exporters/onnx_reading.py",
        "exporters/source.py",
        "exporters/trace.py",
        "exporters/half.py",
        "exporters/graph.py",
        "exporters/openvino.py",
        "exporters/tensorrt.py",
        "exporters/tensorrt_graph.py",
        "exporters/tensorrt_rules.py",
    },
    "onnx_ir": {
        "exporters/trace.py",
        "exporters/simplify.py",
        "exporters/half.py",
        "exporters/onnx_file.py",
    },
    "tensorrt": {"runtimes/tensorrt.py"},
    "cuda": {"runtimes/cuda.py"},
    "onnxscript": {"exporters/simplify.py"},
    "ai_edge_litert": {
        "runtimes/tflite.py",
        "exporters/tflite.py",
        "exporters/tflite_file.py",
        "exporters/tflite_graph.py",
    },
    "ai_edge_quantizer": {"calibration/tflite.py"},
    "litert_torch": {"exporters/tflite.py"},
    "tflite_runtime": {"runtimes/tflite.py"},
    "wandb": {"toolkit/train/track.py"},
    "webdataset": {"toolkit/data/pack.py"},
}


def sources():
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path):
    """(module, inside a function or a type-checking block?) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", id(node) in top


def modules() -> dict[str, Path]:
    """Every module of vitkit by the name it is imported as."""
    found = {}
    for path in sources():
        room, *inside = path.relative_to(ROOT).with_suffix("").parts
        parts = ["vitkit", *([] if room == "toolkit" else [room]), *inside]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph() -> dict[str, set[str]]:
    """Which modules of vitkit each one imports, late imports included, those for type checkers left out."""
    known = modules()
    return {
        name: {module for module in _imported(ast.parse(path.read_text(encoding="utf-8")), known)} - {name}
        for name, path in known.items()
    }


def _imported(node: ast.AST, known: dict[str, Path]):
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        # `from package import module` imports both, but only the module is meant.
        yield from names & known.keys() or {node.module} & known.keys()
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, known)


def circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left of a graph once everything that only leads out of, or into, its circles is taken away."""
    left = set(graph)
    while True:
        on_the_way = {name for name in left if graph[name] & left} & set().union(*(graph[n] for n in left))
        if on_the_way == left:
            return left
        left = on_the_way


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles(graph) == {"b", "c"}
    assert not circles({**graph, "c": {"d"}})


def test_no_modules_import_each_other_in_a_circle():
    assert not circles(import_graph())


def test_no_packages_import_each_other_in_a_circle():
    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for module, wanted in import_graph().items():
        graph.setdefault(package(module), set()).update(map(package, wanted))
    assert not circles({name: wanted - {name} for name, wanted in graph.items()})


def test_devices_get_exactly_what_a_bench_there_imports():
    graph, known = import_graph(), modules()
    needed, waiting = set(), ["vitkit.devices.agent", "vitkit.devices.worker"]
    while waiting:
        module = waiting.pop()
        if module not in needed:
            needed.add(module)
            # Targets and tasks are rows that hold the names of their modules; only runtimes run there.
            nodes = ast.walk(ast.parse(known[module].read_text(encoding="utf-8")))
            texts = {node.value for node in nodes if isinstance(node, ast.Constant)} & known.keys()
            named = [text for text in texts if text.startswith("vitkit.runtimes.")]
            waiting += [*graph[module], *named, *filter(None, [module.rpartition(".")[0]])]
    names = zipfile.ZipFile(BytesIO(runtime_wheel()[1])).namelist()
    sent = {name[:-3].removesuffix("/__init__").replace("/", ".") for name in names if name.endswith(".py")}
    # --fps-target is answered and profiles are made at home, but the room goes as a whole.
    assert sent - {"vitkit.bench.frame_rate", "vitkit.bench.profile"} == needed


def room_of(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] != "vitkit":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "toolkit"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for module, _ in imports(path):
        target = room_of(module)
        if target is not None:
            assert ROOMS[target] <= ROOMS[room], f"{path} imports {module}"
        assert module.split(".")[0] not in ROOMS, f"{path} imports {module} without 'vitkit.'"
        name = module.split(".")[0]
        if name in VENDORS:
            assert str(path.relative_to(ROOT)) in VENDOR_FILES.get(name, set()), f"{path} imports {module}"
        if name == "torch" and room in TORCH_FREE:
            raise AssertionError(f"{path} imports torch")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize("statement", ["import vitkit", "import vitkit.runtimes", "import vitkit.bench"])
def test_runtime_import_is_light(statement):
    heavy = VENDORS | {"torch", "timm", "typer", "rich", "PIL", "safetensors", "matplotlib"}
    assert not loaded_after(statement) & heavy


def test_opening_a_classifier_loads_no_other_task(artifact_of):
    code = "import sys, vitkit.runtimes as v\nwith v.open_engine(sys.argv[1]):\n    print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code, str(artifact_of("onnx", "fp32"))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [name for name in run.stdout.split() if "panoptic" in name or "threadpoolctl" in name]


# What the extra `cli` brings, and nothing else may need.
CLI_PACKAGES = ("typer", "rich", "click", "pydantic", "pygments", "shellingham", "markdown_it", "tomli")


def without_cli(code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys\nfor name in {CLI_PACKAGES}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True)


def test_the_base_install_is_numpy_and_pillow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {item.split(">")[0] for item in project["dependencies"]} == {"numpy", "pillow", "threadpoolctl"}


def test_everything_that_runs_on_a_device_does_without_the_command_lines_packages():
    """Every module of the wheel that a device gets is imported, an engine is run and the doctor answers."""
    code = """
import importlib, io, zipfile
from vitkit.devices.wheel import runtime_wheel
inside = zipfile.ZipFile(io.BytesIO(runtime_wheel()[1])).namelist()
names = [name[:-3] for name in inside if name.endswith(".py")]
for name in names:
    try:
        importlib.import_module(name.removesuffix("/__init__").replace("/", "."))
    except ModuleNotFoundError as error:
        # Their files import at once what no package index has.
        if error.name not in ("cuda", "tensorrt"):
            raise
from vitkit import doctor
checks = doctor.to_json(doctor.diagnose())
print(len(names), len(checks))
"""
    run = without_cli(code)
    assert run.returncode == 0, run.stderr
    modules, checks = map(int, run.stdout.split())
    assert modules > 30
    assert checks > 5


@pytest.mark.parametrize("start", ["vitkit.__main__", "console script"])
def test_the_command_without_its_extra_names_what_to_install(start):
    code = "import runpy; runpy.run_module('vitkit', run_name='__main__')"
    if start == "console script":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, function = project["scripts"]["vitkit"].split(":")
        code = f"import {module} as start; start.{function}()"
    run = without_cli(code)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "pip install 'vitkit[cli]'" in run.stderr


def extras_of(name: str, extras: dict[str, list[str]]) -> set[str]:
    """An extra with all those that it includes."""
    inner = [item[len("vitkit[") : -1].split(",") for item in extras[name] if item.startswith("vitkit[")]
    return {name}.union(*(extras_of(part, extras) for parts in inner for part in parts))


def test_extras_for_making_engines_include_the_command_line_and_those_of_runtimes_do_not():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    with_cli = {name for name in extras if "cli" in extras_of(name, extras)}
    assert {"train", "export", "tflite-export", "report", "all"} <= with_cli
    assert not with_cli & {"onnx", "openvino", "tflite", "tensorrt"}


def test_few_loose_modules_at_the_top():
    loose = {path.stem for path in (ROOT / "toolkit").glob("*.py")} - {"__init__", "__main__"}
    assert len(loose) <= 5, loose


def test_nothing_imports_the_command_line():
    users = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(module.startswith("vitkit.cli") for module, _ in imports(path))
    }
    assert {path for path in users if not path.startswith("toolkit/cli/")} == {"toolkit/__main__.py"}


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom vitkit.cli.main import app\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in run.stdout.split()} & (VENDORS | {"torch", "timm", "numpy"})


def test_the_wheel_holds_every_module_and_is_small(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 600_000
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vitkit/")}
    expected = set()
    for path in sources():
        room, *rest = path.relative_to(ROOT).parts
        expected.add("/".join(["vitkit", *([] if room == "toolkit" else [room]), *rest]))
    page = {"vitkit/report/page.css", "vitkit/report/page.js"}
    assert inside == expected | page | {"vitkit/py.typed"}


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(item for items in extras.values() for item in items)]
    names = {item.split(">")[0].split("[")[0].lower().replace("_", "-") for item in wanted} - {"vitkit"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    # Both follow the GPU's driver, and nothing here installs them.
    assert names - pinned == {"tensorrt", "cuda-python"}
