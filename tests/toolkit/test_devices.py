import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pytest
import tomllib
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bench import write_artifact
from typer.testing import CliRunner

from vitkit.bench import BenchOptions
from vitkit.cli.main import app
from vitkit.devices import registry
from vitkit.devices.link import Link, bench_on
from vitkit.devices.measure import measure
from vitkit.devices.registry import KINDS, Device, default_file, find_machine, read_devices, write_devices
from vitkit.devices.wheel import runtime_wheel
from vitkit.runtimes.card import read_card, sha256, write_card
from vitkit.runtimes.errors import BadRequest, DeviceError, VitkitError

PI = Device("pi", "ssh", "pi@10.0.0.2")
ORIN = Device(
    "orin", "jetson", "ssh://nv@orin:2222", "~/env/bin/python", "/data/vit kit", ("onnx", "openvino")
)
SHORT = BenchOptions(device="cpu", duration=0.02, pool_size=2, threads=1, scopes=("engine",))

text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)
devices = st.builds(
    Device,
    name=st.from_regex(r"[a-z][A-Za-z0-9._-]{3,9}", fullmatch=True).filter(
        lambda n: n.split(".")[0] != "auto"
    ),
    kind=st.sampled_from([kind for kind in KINDS if kind != "local"]),
    address=text.filter(lambda t: not t.startswith("-") and not any(sign.isspace() for sign in t)),
    python=text,
    folder=text,
    targets=st.lists(st.sampled_from(["onnx", "openvino"]), unique=True).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(devices, unique_by=lambda device: device.name.lower(), max_size=4))
def test_devices_survive_the_file(tmp_path_factory, entries):
    file = tmp_path_factory.mktemp("devices") / "new/devices.toml"
    known = {entry.name: entry for entry in entries}
    write_devices(known, file)
    assert read_devices(file) == known
    # A reader of another make sees the same.
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    assert {name: table["address"] for name, table in tables.items()} == {e.name: e.address for e in entries}


def test_a_file_that_a_person_wrote(tmp_path):
    file = tmp_path / "devices.toml"
    file.write_text('[pi]\nkind = "ssh"\naddress = "pi@10.0.0.2"\n')
    assert read_devices(file) == {"pi": PI}
    assert read_devices(tmp_path / "none.toml") == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[pi", "cannot be read"),
        ("pi = 1", "'pi' is no table"),
        ('[pi]\nkind = "ssh"\naddres = "x"', "unknown key 'addres'"),
        ('[pi]\naddress = "x"', "kind of pi is ''"),
        ('[pi]\nkind = "usb"\naddress = "x"', "kind of pi is 'usb'; known are local, ssh"),
        ('[pi]\nkind = "ssh"', "address of pi is ''"),
        ('[pi]\nkind = "ssh"\naddress = 1', "address of pi is 1, not text"),
        ('[pi]\nkind = "ssh"\naddress = "-oProxyCommand=x"', "address of pi is '-oProxyCommand=x'"),
        ('[pi]\nkind = "ssh"\naddress = "a b"', "address of pi is 'a b'"),
        ('[pi]\nkind = "local"\naddress = "x"', "pi is local"),
        ('[pi]\nkind = "local"\npython = ""', "python of pi is ''"),
        ('[pi]\nkind = "local"\nfolder = "a\\nb"', "folder of pi is"),
        ('[pi]\nkind = "local"\ntargets = "onnx"', r"write \['onnx'\]"),
        ('[pi]\nkind = "local"\ntargets = ["vga"]', "target 'vga'"),
        ('[cpu]\nkind = "local"', "cannot be named 'cpu'"),
        ('["a b"]\nkind = "local"', "cannot be named 'a b'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, match):
    file = tmp_path / "devices.toml"
    file.write_text(content)
    with pytest.raises(BadRequest, match=match) as caught:
        read_devices(file)
    assert str(file) in str(caught.value)


def test_targets_are_spelled_in_any_case(tmp_path):
    file = tmp_path / "devices.toml"
    file.write_text('[orin]\nkind = "local"\ntargets = ["ONNX", "TensorRT"]\n')
    assert read_devices(file)["orin"].targets == ("onnx", "tensorrt")


def test_this_machines_devices_need_no_file_and_no_home_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the file of devices was asked for")

    monkeypatch.setattr(registry, "user_folder", refuse)
    for device in (None, "cpu", "CPU", "gpu.1", "cuda"):
        assert find_machine(device) == (None, device)
    artifact = write_artifact(tmp_path / "means")
    command = ["bench", str(artifact), "--device", "cpu", "--scope", "engine", "--duration", "0.01"]
    done = CliRunner().invoke(app, [*command, "--pool-size", "1", "--threads", "1"])
    assert done.exit_code == 0


def test_devices_are_kept_without_a_home_folder(tmp_path):
    """The commands of a user with no HOME who is in no list of users, as in docker run --user 1234."""
    code = (
        "import sys, tempfile, pathlib\n"
        "tempfile.tempdir = sys.argv.pop(1)\n"
        "def home(): raise RuntimeError('Could not determine home directory.')\n"
        "pathlib.Path.home = home\n"
        "from vitkit.cli.main import main\n"
        "main()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CONFIG_HOME")}

    def run(*arguments):
        command = [sys.executable, "-c", code, str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert run("device", "list").returncode == 0
    assert run("device", "add", "robot", "--address", "me@x").returncode == 0
    assert [one["name"] for one in json.loads(run("device", "list", "--json").stdout)] == ["robot"]
    refused = run("bench", str(tmp_path), "--device", "nobody")
    assert refused.returncode == 2
    assert "vitkit device add nobody" in refused.stderr


def test_the_file_lies_in_the_configuration_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_file() == tmp_path / "vitkit/devices.toml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert default_file() == Path.home() / ".config/vitkit/devices.toml"


def test_finding_a_device(tmp_path, monkeypatch):
    file = tmp_path / "devices.toml"
    write_devices({"pi": PI, "orin": ORIN}, file)
    assert find_machine("pi", file) == (PI, None)
    assert find_machine("pi:gpu", file) == (PI, "gpu")
    assert find_machine("jetson", file) == (ORIN, None)
    for device in (None, "cpu", "GPU.1", "AUTO:CPU"):
        assert find_machine(device, file) == (None, device)
    with pytest.raises(BadRequest, match="vitkit device add board --address USER@HOST"):
        find_machine("board", file)
    write_devices({"orin": ORIN, "nano": Device("nano", "jetson", "n")}, file)
    with pytest.raises(BadRequest, match="several Jetsons, orin, nano"):
        find_machine("jetson", file)
    write_devices({"jetson": Device("jetson", "ssh", "n"), "orin": ORIN}, file)
    assert find_machine("jetson", file)[0].kind == "ssh"


def test_a_jetson_needs_no_entry_for_itself(tmp_path, monkeypatch):
    file = tmp_path / "devices.toml"
    with pytest.raises(BadRequest, match="vitkit device add jetson --kind jetson --address USER@HOST"):
        find_machine("jetson", file)
    monkeypatch.setattr(registry, "is_jetson", lambda: True)
    assert find_machine("jetson:cuda", file) == (None, "cuda")


# The wheel


def test_the_wheel_repeats_and_runs_from_the_path(tmp_path):
    digest, data = runtime_wheel()
    assert runtime_wheel() == (digest, data)
    assert len(data) < 200_000
    names = zipfile.ZipFile(BytesIO(data)).namelist()
    assert {"vitkit/bench/__init__.py", "vitkit/runtimes/engine.py", "vitkit/devices/agent.py"} <= set(names)
    assert not [name for name in names if name.startswith(("vitkit/train", "vitkit/models", "vitkit/cli"))]
    path = tmp_path / "vitkit.whl"
    path.write_bytes(data)
    code = "import vitkit.devices.agent as a, importlib.metadata as m; print(a.__file__, m.version('vitkit'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(path))


# Another Python on this machine


@pytest.fixture
def here(tmp_path):
    return Device("here", "local", python=sys.executable, folder=str(tmp_path / "kept"))


def test_a_bench_through_another_python(here, tmp_path):
    artifact = write_artifact(tmp_path / "means")
    (report,) = bench_on(here, [artifact], SHORT)
    assert report.artifact == "means"
    assert report.n > 0
    assert report.environment["machine"] == {"name": "here", "kind": "local"}
    assert sorted(path.name for path in (tmp_path / "kept").iterdir())[0] == "files"
    assert not list((tmp_path / "kept").glob("run.*"))


def test_the_engines_own_device_there(here, tmp_path):
    write_devices({"here": here}, tmp_path / "devices.toml")
    artifact = write_artifact(tmp_path / "means")
    machine, device = find_machine("here:npu", tmp_path / "devices.toml")
    with pytest.raises(DeviceError, match="here: ONNX Runtime has no device 'npu'"):
        measure([artifact], replace(SHORT, device=device), machine)


def for_tensorrt(folder):
    write_artifact(folder)
    write_card(replace(read_card(folder), target="tensorrt"), folder)
    return folder


def test_each_target_has_its_own_device_unless_one_is_named(here, tmp_path):
    file = tmp_path / "devices.toml"
    write_devices({"here": here}, file)
    plain, package = write_artifact(tmp_path / "a" / "means"), for_tensorrt(tmp_path / "b" / "means")

    def run(artifact, device):
        machine, engine_device = find_machine(device, file)
        return measure([artifact], replace(SHORT, device=engine_device, threads=None), machine)

    assert [run(plain, device)[0].device for device in (None, "cpu", "CPU", "here", "here:CPU")] == [
        "cpu"
    ] * 5
    # Named, it is refused before the other process starts; unnamed, only TensorRT itself is missing.
    for device in ("cpu", "here:CPU", "here:gpu"):
        with pytest.raises(
            DeviceError, match=r"tensorrt engines have no device '(cpu|CPU|gpu)', they run on cuda alone"
        ):
            run(package, device)
    for device in () if find_spec("tensorrt") else (None, "cuda", "here", "here:cuda"):
        with pytest.raises(VitkitError, match=r"pip install 'vitkit\[tensorrt\]'"):
            run(package, device)


def test_a_device_that_the_target_cannot_have_is_refused_before_the_link(here, tmp_path):
    package = for_tensorrt(tmp_path / "means")
    away = replace(here, python="/no/python")
    with pytest.raises(DeviceError, match="run on cuda alone"):
        bench_on(away, [package], SHORT)
    with pytest.raises(DeviceError, match="no '/no/python' here"):
        bench_on(away, [package], replace(SHORT, device=None))


def test_decode_options_are_checked_before_the_link(here, tmp_path):
    artifact, away = write_artifact(tmp_path / "means"), replace(here, python="/no/python")
    for decode, text in (({"topp": 3}, "no option 'topp'"), ({"top": 0}, "top is 0")):
        with pytest.raises(BadRequest, match=text):
            bench_on(away, [artifact], replace(SHORT, decode=decode))


def test_a_python_that_is_not_there(here):
    with pytest.raises(DeviceError, match="here: there is no '/no/python' here"):
        Link(Device("here", "local", python="/no/python")).__enter__()


def test_an_account_without_a_home_folder(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Stays as it is, as ~ does for a user who is in no list of users.
    with pytest.raises(DeviceError, match=r"here: there is no home folder for ~nobody-/x; .*--folder PATH"):
        Link(replace(here, folder="~nobody-/x")).__enter__()
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_no_jetson(tmp_path, here, monkeypatch):
    from vitkit.devices import link as module

    class OnThisMachine(Link):
        def __init__(self, device):
            super().__init__(here)

    artifact = write_artifact(tmp_path / "means")
    monkeypatch.setattr(module, "Link", OnThisMachine)
    with pytest.raises(DeviceError, match="orin is no Jetson"):
        bench_on(ORIN, [artifact], SHORT)


# The commands


def test_the_commands(tmp_path):
    file = ["--devices", str(tmp_path / "devices.toml")]

    def run(*arguments):
        return CliRunner().invoke(app, ["device", *arguments, *file])

    assert run("add", "pi", "--address", "pi@10.0.0.2", "--target", "onnx").exit_code == 0
    assert isinstance(run("add", "pi", "--address", "else").exception, BadRequest)
    assert run("add", "pi", "--address", "else", "--replace").exit_code == 0
    assert (
        run("add", "here", "--kind", "local", "--python", sys.executable, "--folder", str(tmp_path)).exit_code
        == 0
    )
    listed = json.loads(run("list", "--json").stdout)
    assert [(one["name"], one["kind"], one["address"]) for one in listed] == [
        ("pi", "ssh", "else"),
        ("here", "local", ""),
    ]
    found = json.loads(run("check", "here", "--json").stdout)
    assert found["ok"]
    assert {"run onnx", "python"} <= {check["name"] for check in found["checks"]}
    assert not [check for check in found["checks"] if check["name"].startswith("train")]
    assert run("remove", "pi").exit_code == 0
    assert isinstance(run("remove", "pi").exception, BadRequest)
    assert [one["name"] for one in json.loads(run("list", "--json").stdout)] == ["here"]


SERVE = """
import sys
from pathlib import Path
from vitkit.devices import agent
agent.SILENCE_S = 1
agent.serve(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("busy", [False, True])
def test_silence_ends_the_far_end(tmp_path, busy):
    artifact, (digest, data) = write_artifact(tmp_path / "means"), runtime_wheel()
    (tmp_path / "files").mkdir()
    names = {}
    for name in ("card.json", "model.onnx"):
        names[name] = sha256(artifact / name)
        shutil.copy(artifact / name, tmp_path / "files" / names[name])
    (tmp_path / digest).write_bytes(data)
    command = [sys.executable, "-c", SERVE, str(tmp_path), str(tmp_path / digest)]
    options = replace(SHORT, duration=60.0).to_json()
    asked = {"do": "bench", "artifacts": ["0"], "folders": {"0": names}, "options": options}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        if busy:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        # The pipe stays open: nothing but silence tells it.
        out = process.stdout.read()
        code = process.wait(20)
        process.stdin.close()
    assert code == -signal.SIGALRM
    assert (b'"crashed": -9' in out) == busy
    assert not list(tmp_path.glob("run.*"))
