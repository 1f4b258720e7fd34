"""An engine reports to nobody: a process that opens and runs one leaves no file and opens no socket."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from tiny import write_tiny

from vitkit.runtimes.privacy import VARIABLES

# The vendors' threads report within a second or two of the first import.
PROGRAM = """
import os, sys, time
import numpy as np
import vitkit

with vitkit.open_engine(sys.argv[1], threads=1) as engine:
    assert engine(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).label == "11"
    time.sleep(2)
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            place = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        assert not place.startswith("socket:"), place
"""


def run(home, *command):
    """Run a program with an empty home, as on a machine where nobody has decided anything."""
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES and name[:4] != "XDG_"}
    # These would keep OpenVINO's reports back.
    for name in ("CI", "TF_BUILD", "JENKINS_URL", "NNCF_CI", "NNCF_DEV"):
        kept.pop(name, None)
    subprocess.run(command, check=True, env={**kept, "HOME": str(home)}, timeout=120)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for sockets in /proc")
@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_an_engine_leaves_no_file_and_no_socket(target, tmp_path):
    folder = write_tiny(tmp_path / "a", target)
    assert run(tmp_path / "home", sys.executable, "-c", PROGRAM, str(folder)) == []


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_an_engine_opens_no_socket_in_its_whole_life(target, tmp_path):
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    folder, log = write_tiny(tmp_path / "a", target), tmp_path / "log"
    trace = (strace, "-f", "-qq", "-o", str(log), "-e", "trace=network")
    if subprocess.run([*trace, "true"], capture_output=True).returncode:
        pytest.skip("strace may not trace here")
    run(tmp_path / "home", *trace, sys.executable, "-c", PROGRAM, str(folder))
    # A look-up of the user's name may ask the system's own name service.
    calls = re.findall(r"^.*\b(?:socket|connect|sendto|sendmsg)\(.*AF_INET.*$", log.read_text(), re.MULTILINE)
    assert calls == []


def test_what_the_user_has_set_stays():
    code = "import os, vitkit.runtimes; print([os.environ[name] for name in sys.argv[1:]])"
    command = [sys.executable, "-c", f"import sys; {code}", *VARIABLES]
    for given, expected in (
        (dict.fromkeys(VARIABLES, "0"), ["0"] * len(VARIABLES)),
        ({}, [*VARIABLES.values()]),
    ):
        env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        found = subprocess.run(command, env=env | given, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    "module",
    ["vitkit.calibration.onnx", "vitkit.exporters", "vitkit.devices.worker", "vitkit.doctor", "vitkit.bench"],
)
def test_whatever_imports_a_vendor_first_has_them_set(module):
    code = (
        f"import os, sys, {module}\n"
        f"assert all(os.environ[name] for name in {[*VARIABLES]})\n"
        "assert 'onnxruntime' not in sys.modules and 'openvino' not in sys.modules\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
