"""Devices over SSH, against a real sshd on loopback with keys made for the test."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytest.importorskip("ai_edge_litert")
from test_bench import write_artifact

from vitkit.bench import BenchOptions
from vitkit.devices.link import Link, bench_on
from vitkit.devices.outputs import fingerprint
from vitkit.devices.registry import Device
from vitkit.doctor import _TINY_TFLITE
from vitkit.runtimes.card import ImageSpec, TensorSpec, read_card, sha256, write_card
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, DeviceError

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
RUNTIME = (
    "numpy",
    "pillow",
    "threadpoolctl",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "backports.strenum",
)
ENGINES = ("onnx", "openvino", "tflite")
# What a shell, a terminal or a path could stumble over.
HOSTILE = "-o Proxy'\"$(touch pwned)`;\\ \n*é"
SHORT = BenchOptions(device="cpu", duration=0.05, pool_size=2, threads=1, scopes=("engine",))

if SSHD is None or shutil.which("ssh") is None:
    pytest.skip("there is no sshd here: apt-get install openssh-server", allow_module_level=True)


@pytest.fixture(scope="session")
def runtime_python(tmp_path_factory) -> Path:
    """A Python of its own that holds what an engine needs and nothing else: no vitkit, no torch."""
    folder = tmp_path_factory.mktemp("runtime") / "env with space"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in RUNTIME:
        for top in {file.parts[0] for file in metadata.files(package) or () if file.parts[0] != ".."}:
            source = Path(str(metadata.distribution(package).locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin/python"


class Host:
    """A running sshd; `device` is a device that it leads to, everything kept below `folder`."""

    def __init__(self, folder: Path, python: Path):
        self.folder, self.port = folder, free_port()
        for key in ("host", "other", "user"):
            make_key(folder / key)
        (folder / "authorized").write_text((folder / "user.pub").read_text())
        self.trust("host")
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nUsePAM no\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nPidFile none\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {folder}/user\n IdentitiesOnly yes\n IdentityAgent none\n"
            f" UserKnownHostsFile {folder}/known\n GlobalKnownHostsFile /dev/null\n"
            # What vitkit must not let through.
            " StrictHostKeyChecking no\n"
        )
        wrapper = folder / "bin/ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        user = pwd.getpwuid(os.getuid()).pw_name
        address = f"ssh://{user}@127.0.0.1:{self.port}"
        self.device = Device("box", "ssh", address, str(python), str(folder / "it's kept $HERE"))

    def start(self) -> None:
        # Root's sshd wants the folder that the system's service would make.
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.log = (self.folder / "sshd.log").open("wb")
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")], stderr=self.log
        )
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.skip(f"sshd does not start here: {(self.folder / 'sshd.log').read_text()}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()

    def trust(self, key: str | None) -> None:
        public = (self.folder / f"{key}.pub").read_text().split()[:2] if key else None
        line = f"[127.0.0.1]:{self.port} {' '.join(public)}\n" if public else ""
        (self.folder / "known").write_text(line)

    def drop(self) -> None:
        """End all connections as a cut cable would, leaving the server."""
        for pid in children_of(self.process.pid):
            os.kill(pid, signal.SIGKILL)
            for below in children_of(pid):
                if b"sshd" in Path(f"/proc/{below}/comm").read_bytes():
                    os.kill(below, signal.SIGKILL)

    def workers(self) -> list[int]:
        """Processes that run out of this host's folder."""
        mark = str(self.folder / "it's kept $HERE").encode()
        return [pid for pid in pids() if mark in read(f"/proc/{pid}/environ")]

    def left_over(self) -> list[str]:
        """What lies in the device's folder besides whole kept files."""
        kept = Path(self.device.folder)
        files = [path for path in (*kept.glob("*"), *kept.glob("files/*")) if path.name != "files"]
        whole = [path for path in files if path.name.startswith("vitkit-") or len(path.name) == 64]
        assert all(sha256(path) in path.name for path in whole)
        return [path.name for path in files if path not in whole]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def children_of(parent: int) -> list[int]:
    return [pid for pid in pids() if f"\nPPid:\t{parent}\n".encode() in read(f"/proc/{pid}/status")]


def wait_until(condition, seconds=10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def running(tmp_path_factory, runtime_python):
    host = Host(tmp_path_factory.mktemp("host"), runtime_python)
    host.start()
    yield host
    host.stop()


@pytest.fixture
def host(running, monkeypatch):
    monkeypatch.setenv("PATH", f"{running.folder / 'bin'}:{os.environ['PATH']}")
    running.trust("host")
    return running


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> list[Path]:
    """One artifact of each engine that runs without a GPU, in folders with hostile names."""
    folder = tmp_path_factory.mktemp("artifacts")
    paths = [write_artifact(folder / f"{HOSTILE}{target}") for target in ENGINES]
    write_card(replace(read_card(paths[1]), target="openvino"), paths[1])
    (paths[2] / "model.onnx").unlink()
    (paths[2] / "model.tflite").write_bytes(_TINY_TFLITE)
    tiny = {
        "inputs": (TensorSpec("x", (1, 2, 2, 3), "uint8"),),
        "outputs": (TensorSpec("logits", (1, 12), "float32"),),
        "image": ImageSpec(size=(2, 2)),
        "labels": (),
        "files": {"model.tflite": sha256(paths[2] / "model.tflite")},
    }
    write_card(replace(read_card(paths[2]), target="tflite", engine="model.tflite", **tiny), paths[2])
    return paths


@pytest.fixture(scope="module")
def big_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("big") / "weights"
    path.write_bytes(os.urandom(20 << 20))
    return path


def test_a_bench_of_all_engines(host, artifacts, photo_folder, tmp_path):
    seen = []
    options = replace(SHORT, images=photo_folder, scopes=("image",))
    reports = bench_on(host.device, artifacts, options, progress=lambda text, done: seen.append((text, done)))
    assert [one.artifact for one in reports] == [path.name for path in artifacts]
    assert [one.target for one in reports] == list(ENGINES)
    for one, path in zip(reports, artifacts, strict=True):
        assert sum(one.times_ns) >= 0.05e9
        assert one.files == read_card(path).files
        assert one.environment["machine"] == {"name": "box", "kind": "ssh"}
        assert one.pool == {"source": str(photo_folder), "size": 2, "seed": 0, "unreadable": 0}
    assert seen[-1][1] == 1.0
    assert any(text.startswith("measuring") for text, _ in seen)
    assert host.left_over() == []
    assert not list(Path.home().glob("pwned")) + list(tmp_path.glob("pwned"))
    # What is there is not sent again.
    with Link(host.device) as link:
        assert link.send({sha256(artifacts[0] / "model.onnx"): artifacts[0] / "model.onnx"}, print) == 0


def test_every_engines_outputs_arrive_bit_for_bit(host, artifacts, photo_folder):
    from vitkit.runtimes.engine import open_engine
    from vitkit.runtimes.image import read_image

    images = sorted(photo_folder.rglob("*.jpg"))[:5]
    for path in artifacts:
        with open_engine(path, threads=1) as engine, Link(host.device) as link:
            running = link.run(path, [images[:3], images[3:]], threads=1)
            for group, ran in zip((images[:3], images[3:]), running.results, strict=True):
                inputs = engine.prepare([read_image(image) for image in group])
                assert ran.inputs == [fingerprint(row) for row in inputs]
                for name, value in engine.run_batched(inputs).items():
                    assert ran.outputs[name].tobytes() == value.tobytes()
            assert running.settings == engine.session.settings
    assert wait_until(lambda: not host.workers())
    assert host.left_over() == []


def test_a_link_that_breaks_while_outputs_come(host, artifacts, photo_folder):
    images = sorted(photo_folder.rglob("*.jpg"))
    # More results than the pipes hold, so that the device waits for its reader.
    groups = [[images[i % len(images)]] for i in range(3000)]
    with Link(host.device) as link:
        running = link.run(artifacts[0], groups)
        next(running.results)
        host.drop()
        with pytest.raises(DeviceError, match="box: the link to"):
            deque(running.results, maxlen=0)
    assert wait_until(lambda: not host.workers())
    assert wait_until(lambda: host.left_over() == [])


def test_a_reader_that_goes_early_stops_the_device(host, artifacts, photo_folder):
    images = sorted(photo_folder.rglob("*.jpg"))
    with Link(host.device) as link:
        running = link.run(artifacts[0], [[images[i % len(images)]] for i in range(3000)])
        next(running.results)
    assert wait_until(lambda: not host.workers())
    assert wait_until(lambda: host.left_over() == [])


def test_it_diagnoses_itself_and_needs_no_vitkit(host, runtime_python):
    code = "import importlib.util as u; print([m for m in ('vitkit', 'torch', 'rich') if u.find_spec(m)])"
    found = subprocess.run([runtime_python, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    with Link(host.device) as link:
        condition = link.check()
    checks = {check.name: check for check in condition.findings}
    assert condition.python == ".".join(map(str, sys.version_info[:3]))
    assert not condition.jetson
    assert checks["run onnx"].ok
    assert checks["run openvino"].ok
    assert checks["run tflite"].ok
    assert not checks["train: torch"].ok


def test_an_error_there_is_an_error_here(host, artifacts, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(BadInput, match="box: none of the 1 images"):
        bench_on(host.device, artifacts[:1], replace(SHORT, images=tmp_path / "images"))
    broken = write_artifact(tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"no model")
    with pytest.raises(BadArtifact, match="not what was exported"):
        bench_on(host.device, [broken], SHORT)
    meant = replace(host.device, targets=("openvino",))
    with pytest.raises(BadRequest, match="compiled for onnx, and box is meant for openvino"):
        bench_on(meant, artifacts[:1], SHORT)
    assert host.left_over() == []


# Faults


def test_a_link_that_breaks_while_measuring(host, artifacts):
    def cut(text, done):
        if text.startswith("measuring"):
            host.drop()

    with pytest.raises(DeviceError, match="box: the link to"):
        bench_on(host.device, artifacts[:1], replace(SHORT, duration=60.0), progress=cut)
    assert wait_until(lambda: not host.workers())
    assert wait_until(lambda: host.left_over() == [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_here_stops_there(host, artifacts, tmp_path, number):
    from vitkit.devices.registry import write_devices

    write_devices({"box": host.device}, tmp_path / "devices.toml")
    command = [sys.executable, "-m", "vitkit", "bench", str(artifacts[0]), "--device", "box"]
    options = [
        "--devices",
        str(tmp_path / "devices.toml"),
        "--duration",
        "60",
        "--json",
        str(tmp_path / "r.json"),
    ]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Whoever started the tests in the background may have them, and their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert wait_until(lambda: len(host.workers()) > 0, 20)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert wait_until(lambda: not host.workers())
    assert wait_until(lambda: host.left_over() == [])
    assert not (tmp_path / "r.json").exists()


def test_a_broken_copy_goes_on_where_it_was(host, big_file):
    digest, size = sha256(big_file), big_file.stat().st_size
    store = Path(host.device.folder) / "files"

    def cut(text, done):
        if done > 0.5:
            host.drop()

    with pytest.raises(DeviceError, match="box: the link to"), Link(host.device) as link:
        link.send({digest: big_file}, cut)
    assert not (store / digest).exists()
    part = store / f"{digest}.part"
    assert wait_until(lambda: part.exists() and part.stat().st_size > 0)
    with Link(host.device) as link:
        sent = link.send({digest: big_file}, lambda text, done: None)
    assert 0 < sent < size
    assert sha256(store / digest) == digest
    assert not part.exists()


def test_a_part_that_holds_other_bytes_is_found_out(host, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    digest = sha256(path)
    part = Path(host.device.folder) / "files" / f"{digest}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"y" * 500)
    with pytest.raises(DeviceError, match="arrived damaged"), Link(host.device) as link:
        link.send({digest: path}, lambda text, done: None)
    assert not part.exists()


def test_an_engine_that_crashes_is_told(host, artifacts):
    def kill(text, done):
        if text.startswith("measuring"):
            os.kill(max(host.workers()), signal.SIGSEGV)

    with pytest.raises(DeviceError, match=r"box: the engine crashed while it was measured \(SIGSEGV\)"):
        bench_on(host.device, artifacts[:1], replace(SHORT, duration=60.0), progress=kill)
    assert wait_until(lambda: host.left_over() == [])


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("other", "shows another host key than the known one.*ssh-keygen -R"),
        (None, "host key of .* is not known"),
    ],
)
def test_host_keys_are_always_checked(host, key, text):
    host.trust(key)
    before = (host.folder / "known").read_text()
    with pytest.raises(DeviceError, match=text), Link(host.device):
        pass
    assert (host.folder / "known").read_text() == before


def test_a_key_that_is_not_accepted(host, tmp_path, monkeypatch):
    accepted = (host.folder / "authorized").read_text()
    (host.folder / "authorized").write_text((host.folder / "other.pub").read_text())
    try:
        with (
            pytest.raises(DeviceError, match=r"accepts none of your keys; .* ssh-copy-id"),
            Link(host.device),
        ):
            pass
    finally:
        (host.folder / "authorized").write_text(accepted)


def test_nobody_listens(host):
    away = replace(host.device, address=f"ssh://127.0.0.1:{free_port()}")
    with pytest.raises(DeviceError, match=r"box: the link to .* failed: .*[Rr]efused"), Link(away):
        pass


def test_a_missing_python(host):
    with pytest.raises(
        DeviceError, match="there is no Python at /no/python; name one: vitkit device add box "
    ):
        Link(replace(host.device, python="/no/python")).__enter__()


def wrapper(folder: Path, text: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_old_python(host, runtime_python, tmp_path):
    old = "import sys; sys.version_info = (3, 8, 10); sys.version = '3.8.10 (old)'; exec(sys.argv[1])"
    python = wrapper(tmp_path, f'exec \'{runtime_python}\' -c "{old}" "$2"')
    with pytest.raises(DeviceError, match=r"is Python 3\.8\.10, vitkit needs 3\.10"):
        Link(replace(host.device, python=str(python))).__enter__()


def test_a_python_without_numpy(host, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = tmp_path / "bare/bin/python"
    with pytest.raises(DeviceError, match="has no package 'numpy'; install on the device with"):
        Link(replace(host.device, python=str(python))).__enter__()


def test_talkative_shells_do_no_harm(host, runtime_python, tmp_path):
    python = wrapper(tmp_path, f"echo 'Welcome!'; echo 'vitkit is not here'; exec '{runtime_python}' \"$@\"")
    with Link(replace(host.device, python=str(python))) as link:
        assert link.send({}, lambda text, done: None) == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "vitkit-test", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def test_a_disk_that_is_too_small(host, big_file, small_disk):
    device = replace(host.device, folder=str(small_disk / "kept"))
    with pytest.raises(DeviceError, match=r"MB free, 21\.0 MB are needed"), Link(device) as link:
        link.send({sha256(big_file): big_file}, lambda text, done: None)


def test_a_disk_that_fills_up_while_copying(host, small_disk):
    device = replace(host.device, folder=str(small_disk / "kept"))
    path = small_disk.parent / "file"
    path.write_bytes(os.urandom(12 << 20))
    with pytest.raises(DeviceError, match=r"box: the disk that holds .* is full"), Link(device) as link:
        link.send({sha256(path): path}, lambda text, done: fill(small_disk))
    assert not list((small_disk / "kept/files").glob("*"))
    (small_disk / "filler").unlink()
    with Link(device) as link:
        assert link.send({sha256(path): path}, lambda text, done: None) == 12 << 20


def test_a_disk_without_room_for_vitkit(host, small_disk):
    fill(small_disk)
    with pytest.raises(DeviceError, match="cannot be used: No space left"):
        Link(replace(host.device, folder=str(small_disk / "kept"))).__enter__()
    assert not list(small_disk.rglob("vitkit-*"))
