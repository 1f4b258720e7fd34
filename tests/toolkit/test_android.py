"""Phones: what benchmark_model prints, and the way there by adb."""
# ruff: noqa: E501 - recorded lines are as long as they are.

import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import write_artifact
from typer.testing import CliRunner

from vitkit.bench import BenchOptions
from vitkit.cli.main import app
from vitkit.devices.android import PhoneReport, Timing, bench_on_phone, facts, parse_benchmark_model, save
from vitkit.devices.registry import Device, read_devices, write_devices
from vitkit.runtimes.card import read_card, sha256, write_card
from vitkit.runtimes.errors import BadRequest, DeviceError

# The lines of figures as phones printed them; sources beside.
ORIGINAL = """Initialized session in 0.855ms.
count=15 first=49060 curr=33682 min=32825 max=49060 avg=34825.1 std=3930

count=50 first=32891 curr=33978 min=32641 max=34005 avg=33209.4 std=450

Inference timings in us: Init: 855, First inference: 49060, Warmup (avg): 34825.1, Inference (avg): 33209.4
Peak memory footprint (MB): init=0 overall=12.8672
"""  # tensorflow/tensorflow#42507
PREFIXED = """INFO: Initialized session in 12.75ms.
INFO: count=37 first=14744 curr=15520 min=13164 max=18295 avg=13764.3 std=967
INFO: count=74 first=14850 curr=13315 min=13105 max=15765 avg=13520.2 std=470
INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, Inference (avg): 13520.2
"""  # tensorflow/tensorflow#73862
SLOW = """count=1 curr=3512391
count=50 first=2990275 curr=2913402 min=2727568 max=3189954 avg=2.95034e+06 std=109798
Inference timings in us: Init: 17187, First inference: 3512391, Warmup (avg): 3.51239e+06, Inference (avg): 2.95034e+06
Memory footprint delta from the start of the tool (MB): init=4.21094 overall=46.0859
"""  # a board under QEMU
NEW = """I tflite  : count=25 first=187533 curr=140990 min=140071 max=195121 avg=145528 std=13583 p5=140545 median=141253 p95=187533
I tflite  : Inference timings in us: Init: 92318, First inference: 187533, Warmup (avg): 211669, Inference (avg): 145528
I tflite  : Memory footprint delta from the start of the tool (MB): init=54.2852 overall=73.4102
"""  # Android's log, a version with percentiles
ONCE = """count=1 curr=500
count=1 curr=400
Inference timings in us: Init: 7, First inference: 500, Warmup (avg): 500, Inference (avg): 400
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ORIGINAL, Timing(855, 49060, 34825.1, 33209.4, 50, 32641, 34005, 450, None, None, 12.8672)),
        (PREFIXED, Timing(12750, 14744, 13764.3, 13520.2, 74, 13105, 15765, 470, None, None, None)),
        (SLOW, Timing(17187, 3512391, 3512390, 2950340, 50, 2727568, 3189954, 109798, None, None, 46.0859)),
        (NEW, Timing(92318, 187533, 211669, 145528, 25, 140071, 195121, 13583, 141253, 187533, 73.4102)),
        (ONCE, Timing(7, 500, 500, 400, 1, 400, 400, 0, None, None, None)),
    ],
)
def test_recorded_outputs(text, expected):
    assert parse_benchmark_model(text) == expected
    assert parse_benchmark_model(text.replace("\n", "\r\n")) == expected


@pytest.mark.parametrize(
    "text", ["", "count=1 curr=5", "Failed to load model\n", ORIGINAL.split("\n\nInf")[0]]
)
def test_outputs_without_a_result(text):
    with pytest.raises(DeviceError, match=r"gave no result; its last words: ."):
        parse_benchmark_model(text)


def report(*means: float, thermal=(0,)) -> PhoneReport:
    tries = [Timing(1, 1, 1, mean, 1, 1, 1, 0, None, None, None) for mean in means]
    return PhoneReport("a", "m", "int8", {}, 1, "phone", None, 300.0, {}, tries, list(thermal), [])


def test_tries_must_agree_and_stay_cool():
    assert report(100, 101, 102, 103, 104.9).invalid is None
    assert "are 6.0% apart" in report(100, 101, 102, 103, 106).invalid
    assert "4 tries" in report(100, 100, 100, 100).invalid
    assert "thermal status 2" in report(*[100] * 5, thermal=[0, None, 2]).invalid


# The way there

# Stands in for adb and a phone: the phone's files lie in a folder of this machine.
# Until a first call has started its daemon it announces that, as after a reboot; phones warn at each call.
ADB = """#!/bin/sh
if [ ! -e "$LOG" ]; then
    echo "* daemon not running; starting now at tcp:5037" >&2
    echo "* daemon started successfully" >&2
fi
[ "$1" = -s ] && [ "$2" = "it's" ] && shift 2
echo "$@" >> "$LOG"
case "$1" in
get-state) echo device;;
push) cp "$2" "$3";;
shell) echo "WARNING: linker: unused DT entry" >&2; PATH="$TOOLS:$PATH" sh -c "$2";;
esac
"""
TOOL = f"""#!/bin/sh
test -f "${{1#--graph=}}" || exit 1
cat <<'END'
{ORIGINAL}
END
"""


@pytest.fixture
def phone(tmp_path, monkeypatch):
    tools = {"adb": ADB, "getprop": "#!/bin/sh\necho Pixel", "dumpsys": "#!/bin/sh\necho Thermal Status: 0"}
    for name, text in {**tools, "benchmark model": TOOL}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TOOLS", str(tmp_path / "bin"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    folder = str(tmp_path / "on the $phone")
    return Device("phone", "adb", "it's", folder=folder, tool=str(tmp_path / "bin/benchmark model"))


@pytest.fixture
def artifact(tmp_path):
    folder = write_artifact(tmp_path / "means")
    write_card(replace(read_card(folder), target="tflite"), folder)
    return folder


def measure(phone, artifact):
    return bench_on_phone(
        phone,
        artifact,
        BenchOptions(threads=2, duration=1.0, cool_down=0.0),
        progress=lambda text, done: None,
    )


def test_five_tries_and_nothing_is_copied_twice(phone, artifact, tmp_path):
    found = measure(phone, artifact)
    assert [one.mean_us for one in found.tries] == [33209.4] * 5
    assert found.invalid is None
    assert found.facts == {"model": "Pixel", "android": "Pixel", "soc": "Pixel"}
    kept = {path.name for path in Path(phone.folder).iterdir()}
    assert kept == {sha256(Path(phone.tool)), sha256(artifact / "model.onnx")}
    calls = (tmp_path / "log").read_text()
    assert calls.count("push") == 2
    assert "--num_threads=2" in calls
    measure(phone, artifact)
    assert (tmp_path / "log").read_text().count("push") == 2
    save([found], tmp_path / "phone.json")
    assert json.loads((tmp_path / "phone.json").read_text())["phone_reports"][0]["summary"]["invalid"] is None


def test_the_tool_may_print_to_either_stream(phone, artifact):
    tool = Path(phone.tool)
    tool.write_text(TOOL.replace("cat <<", "cat >&2 <<"))
    assert measure(phone, artifact).tries[0].mean_us == 33209.4


def test_a_failure_is_told_without_the_daemon(phone, monkeypatch):
    for name in ("getprop", "dumpsys"):
        (Path(phone.tool).parent / name).unlink()
    (Path(phone.tool).parent / "adb").write_text(
        "#!/bin/sh\necho '* daemon started successfully' >&2\necho 'error: device offline' >&2\nexit 1\n"
    )
    with pytest.raises(DeviceError, match=r"adb get-state failed: error: device offline; see"):
        facts(phone)


def test_a_tool_that_fails(phone, artifact):
    Path(phone.tool).write_text("#!/bin/sh\necho Illegal instruction; exit 132\n")
    with pytest.raises(DeviceError, match="phone: adb shell failed: Illegal instruction"):
        measure(phone, artifact)


def test_refusals(phone, artifact, tmp_path):
    with pytest.raises(BadRequest, match=r"has no benchmark_model .* --tool PATH"):
        measure(replace(phone, tool=""), artifact)
    with pytest.raises(BadRequest, match="compiled for onnx; phones are measured with tflite"):
        measure(phone, write_artifact(tmp_path / "onnx"))
    file = tmp_path / "devices.toml"
    write_devices({"phone": phone}, file)
    assert read_devices(file) == {"phone": phone}
    command = ["bench", str(artifact), "--device", "phone", "--devices", str(file), "--fps-target", "30"]
    assert "is not for phones" in str(CliRunner().invoke(app, command).exception)
    assert Device("p", "adb").folder == "/data/local/tmp/vitkit"


# A real adb server


@pytest.fixture
def adb_server(monkeypatch):
    if shutil.which("adb") is None:
        pytest.skip("there is no adb here: apt-get install adb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(probe.getsockname()[1]))
    subprocess.run(["adb", "start-server"], check=True, capture_output=True)
    yield
    subprocess.run(["adb", "kill-server"], check=True, capture_output=True)


@pytest.mark.usefixtures("adb_server")
def test_no_phone_is_plugged_in():
    with pytest.raises(DeviceError, match=r"phone: adb get-state failed: .*not found.*adb devices -l"):
        facts(Device("phone", "adb", "no-such-serial"))
    with pytest.raises(DeviceError, match=r"phone: adb get-state failed: .*no devices"):
        facts(Device("phone", "adb"))


def test_no_adb(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="apt-get install adb"):
        facts(Device("phone", "adb"))
