"""Opening: what was hashed is what runs, one spelling of devices, and files that a vendor is too old for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny import IMAGE, write_tiny

import vitkit
from vitkit import BadArtifact, BadRequest, DeviceError, TensorSpec
from vitkit.runtimes import engine as engine_module
from vitkit.runtimes.card import Artifact, read_card, read_engine, sha256, write_card
from vitkit.runtimes.files import atomic_folder, shown_as


def onnx_graph(last: float, *, opset: int = 17, ir: int = 9, external: Path | None = None) -> bytes:
    """The 12 values of a picture plus a constant of 12, of which the last is `last`."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    weights = helper.make_tensor("value", TensorProto.FLOAT, [12], np.eye(12, dtype=np.float32)[11] * last)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["f"], ["flat"], axis=1),
            helper.make_node("Add", ["flat", "value"], ["logits"]),
        ],
        "g",
        [info("x", TensorProto.UINT8, [1, 2, 2, 3])],
        [info("logits", TensorProto.FLOAT, [1, 12])],
        [onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights), "value")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    if external is None:
        return model.SerializeToString()
    onnx.save(model, external, save_as_external_data=True, location=f"{external.name}.data", size_threshold=1)
    return external.read_bytes()


def openvino_files(last: float) -> dict[str, bytes]:
    """`model.xml` and `model.bin` of that graph: they differ in their weights alone."""
    import tempfile

    openvino = pytest.importorskip("openvino")
    with tempfile.TemporaryDirectory() as name:
        openvino.save_model(openvino.Core().read_model(onnx_graph(last)), Path(name) / "model.xml")
        return {file: (Path(name) / file).read_bytes() for file in ("model.xml", "model.bin")}


def tflite_graph(scale: float) -> bytes:
    """Turns the bytes of a picture into numbers of one scale."""
    pytest.importorskip("ai_edge_litert")
    from test_tflite import quantise_file

    return quantise_file(("UINT8", "INT8"), [(1.0, 0), (scale, 0)])


# Of each target: an artifact's files and what it says of IMAGE, then the same of another network.
def versions(target):
    if target == "tflite":
        return [({"model.tflite": tflite_graph(scale)}, scale) for scale in (0.5, 0.25)]
    if target == "openvino":
        return [(openvino_files(last), 11 + last) for last in (1.0, 1000.0)]
    return [({"model.onnx": onnx_graph(last)}, 11 + last) for last in (1.0, 1000.0)]


def answer(engine, target):
    output = engine.run({engine.card.inputs[0].name: IMAGE[None]})
    (values,) = output.values()
    # 127 is the last step of int8, so it shows the scale.
    return float(values.ravel()[-1]) if target != "tflite" else engine.session._outputs[0].scale


def write(folder, target, files):
    tensors = {}
    if target == "tflite":
        spec = TensorSpec("out", (1, 2, 2, 3), "float32")
        tensors = {"inputs": (TensorSpec("in", (1, 2, 2, 3), "uint8"),), "outputs": (spec,)}
    engine = "model.xml" if target == "openvino" else next(iter(files))
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    write_tiny(
        folder, target, engine=engine, files={name: sha256(folder / name) for name in files}, **tensors
    )
    if target == "openvino":
        (folder / "model.onnx").unlink()
    (folder / engine).write_bytes(files[engine])
    return folder


@pytest.fixture(params=["onnx", "openvino", "tflite"])
def replaced(request, tmp_path, monkeypatch):
    """An artifact, its target, what it answers, and a call that puts another network in its place."""
    target = request.param
    # A task of raw numbers is none, so the decoding is left away.
    monkeypatch.setattr(engine_module, "decoder", lambda card, options: None)
    (files, expected), (other, wrong) = versions(target)
    folder = write(tmp_path / "a", target, files)
    assert expected != wrong

    def put(content, how):
        for name, data in content.items():
            place = folder / name
            if how == "in place":
                place.write_bytes(data)
            else:
                (tmp_path / f"{name}.new").write_bytes(data)
                os.replace(tmp_path / f"{name}.new", place)

    return folder, target, expected, lambda how: put(other, how), lambda how: put(files, how)


@pytest.mark.parametrize("how", ["renamed", "in place"])
def test_a_file_that_is_replaced_between_hashing_and_opening_does_not_run(replaced, how, monkeypatch):
    folder, target, expected, put_other, _ = replaced
    check = engine_module.check_device

    def late(*arguments):
        put_other(how)
        return check(*arguments)

    # Called after the files have been compared and before the vendor sees them.
    monkeypatch.setattr(engine_module, "check_device", late)
    with vitkit.open_engine(folder, threads=1) as engine:
        assert answer(engine, target) == expected
        # Nor does it while the engine is open, though vendors would map the file.
        put_other("in place")
        assert answer(engine, target) == expected
    with pytest.raises(BadArtifact, match="SHA-256"):
        vitkit.open_engine(folder, threads=1)


def test_a_file_that_is_renamed_all_the_time_never_runs_others_weights(replaced):
    folder, target, expected, put_other, put_back = replaced
    stop = threading.Event()

    def rename():
        while not stop.is_set():
            put_other("renamed")
            put_back("renamed")

    thread = threading.Thread(target=rename)
    thread.start()
    found = []
    try:
        for _ in range(50):
            try:
                with vitkit.open_engine(folder, threads=1) as engine:
                    found.append(answer(engine, target))
            except BadArtifact as error:
                found.append(expected if "SHA-256" in str(error) else str(error))
    finally:
        stop.set()
        thread.join()
    assert set(found) == {expected}


def test_the_hash_is_of_the_bytes_that_are_handed_on(tmp_path):
    folder = write_tiny(tmp_path / "a", "onnx")
    artifact, files = read_engine(folder)
    assert files == {"model.onnx": (folder / "model.onnx").read_bytes()}
    card = read_card(folder)
    write_card(type(card)(**{**card.__dict__, "files": {"model.onnx": "0" * 64}}), folder)
    with pytest.raises(BadArtifact, match="has SHA-256"):
        read_engine(folder)
    assert artifact.engine_files == ["model.onnx"]


def test_engine_files_are_those_of_the_engines_stem(tmp_path):
    names = ("model.onnx", "model.onnx.data", "model.bin", "models.bin", "golden.npz", "model")
    folder = write_tiny(tmp_path / "a", "onnx", files={name: None for name in names})
    for name in names[1:]:
        (folder / name).write_bytes(b"1234")
    artifact = Artifact(folder, read_card(folder))
    assert artifact.engine_files == ["model.onnx", "model.onnx.data", "model.bin"]
    assert artifact.size_bytes == (folder / "model.onnx").stat().st_size + 8


# Weights in other files


@pytest.fixture
def external(tmp_path):
    (tmp_path / "a").mkdir()
    graph = onnx_graph(1.0, external=tmp_path / "a" / "model.onnx")
    return tmp_path / "a", graph


def test_weights_of_other_files_are_read_if_the_card_lists_them(external):
    import onnxruntime

    if not hasattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory"):
        pytest.skip("this ONNX Runtime cannot take them from memory")
    folder, graph = external
    hashes = {name: sha256(folder / name) for name in ("model.onnx", "model.onnx.data")}
    write_tiny(folder, "onnx", graph, files=hashes)
    with vitkit.open_engine(folder, threads=1) as engine:
        assert engine.run({"x": IMAGE[None]})["logits"].ravel()[-1] == 12
    (folder / "model.onnx.data").write_bytes(np.full(12, 5, np.float32).tobytes())
    with pytest.raises(BadArtifact, match=r"model\.onnx\.data .* has SHA-256"):
        vitkit.open_engine(folder, threads=1)


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_weights_of_a_file_that_is_not_listed_are_never_read(target, external, monkeypatch):
    """Of a graph that comes from memory the vendors look for them in the current folder."""
    folder, graph = external
    write_tiny(folder, target, graph)
    monkeypatch.chdir(folder)
    (folder / "model.onnx.data").rename(folder / "weights")
    graph = graph.replace(b"model.onnx.data", b"weights".ljust(15, b"_"))
    (folder / "weights").rename(folder / "weights________")
    write_tiny(folder, target, graph)
    with pytest.raises(BadArtifact, match="with its weights inside"):
        vitkit.open_engine(folder, threads=1)


# Devices


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_devices_are_spelled_in_any_case(target, tmp_path):
    folder = write_tiny(tmp_path / "a", target)
    for device in ("cpu", "CPU", "Cpu", None):
        with vitkit.open_engine(folder, threads=1, device=device) as engine:
            assert engine.device == "cpu"
            assert engine(IMAGE).label == "11"
    for device in ("toaster", "", "cpu ", "cuda:x"):
        with pytest.raises(DeviceError, match=r"cpu") as caught:
            vitkit.open_engine(folder, device=device)
        assert repr(device) in str(caught.value)


def test_a_bench_reports_one_spelling(tmp_path):
    from vitkit.bench import BenchOptions, bench

    folder = write_tiny(tmp_path / "a", "onnx")
    options = BenchOptions(device="CPU", threads=1, duration=0.01, pool_size=1, scopes=("engine",))
    assert [report.device for report in bench([folder], options)] == ["cpu"]


# Tasks


def test_an_engine_for_another_task_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "a", "onnx")
    with vitkit.open_engine(folder, task="classification", threads=1) as engine:
        assert engine(IMAGE).label == "11"
    with pytest.raises(BadRequest, match="a is an engine for classification, not for panoptic"):
        vitkit.open_engine(folder, task="panoptic")
    for task in ("poetry", 3, ["classification"]):
        with pytest.raises(BadRequest, match="known are classification, panoptic"):
            vitkit.open_engine(folder, task=task)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no threads"), OSError(11, "try again")])
def test_whatever_a_vendor_raises_while_it_opens_is_a_vitkit_error(error, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from vitkit.runtimes import openvino as runtime

    def fail():
        raise error

    monkeypatch.setattr(runtime, "capabilities", fail)
    with pytest.raises(BadArtifact, match=f"a cannot be opened: {type(error).__name__}") as caught:
        vitkit.open_engine(write_tiny(tmp_path / "a", "openvino"))
    assert caught.value.__cause__ is error


# Vendors that are too old


def test_a_file_that_is_too_new_names_what_it_needs(tmp_path):
    """No ONNX Runtime reads these yet; the IR version stands in every file, as the opset does."""
    for changes, words in (({"ir": 99}, "reads IR version 99"), ({"opset": 99}, "reads opset 99")):
        folder = write_tiny(tmp_path / str(changes), "onnx", onnx_graph(1.0, **changes))
        with pytest.raises(BadArtifact, match=rf"{words}: export again with --opset \d+$"):
            vitkit.open_engine(folder, threads=1)


@pytest.mark.parametrize(
    ("version", "text", "words"),
    [
        # Copied from what these versions say.
        (
            "1.20.1",
            "model.cc:180 onnxruntime::Model::Model(...) Unsupported model IR version: 11, max supported IR "
            "version: 10\n",
            "IR version 11 needs ONNX Runtime 1.23 or newer, here is 1.20.1: pip install --upgrade "
            "'onnxruntime>=1.23'",
        ),
        (
            "1.20.1",
            "ONNX Runtime only *guarantees* support for models stamped with official released onnx opset "
            "versions. Opset 22 is under development and support for this is limited. [...] "
            "Current official support for domain ai.onnx is till opset 21.\n",
            "opset 22 needs ONNX Runtime 1.21 or newer, here is 1.20.1: pip install --upgrade "
            "'onnxruntime>=1.21'",
        ),
        (
            "1.23.2",
            "Opset 24 is under development and support for this is limited.",
            "opset 24 needs ONNX Runtime 1.24 or newer, here is 1.23.2: pip install --upgrade "
            "'onnxruntime>=1.24'",
        ),
        (
            "1.20.1",
            "Unsupported model IR version: 12, max supported",
            "IR version 12 needs ONNX Runtime 1.24 or newer",
        ),
    ],
)
def test_an_old_onnx_runtime_is_told_from_its_words(version, text, words):
    pytest.importorskip("onnxruntime")
    from vitkit.runtimes.onnx import _remedy

    assert words in _remedy(text, version)


# Temporary folders


def test_no_message_names_a_temporary_folder(tmp_path):
    error = None
    try:
        with atomic_folder(tmp_path / "out") as folder:
            write_tiny(folder, "onnx", b"not an engine")
            vitkit.open_engine(folder)
    except BadArtifact as caught:
        error = str(caught)
    assert f"cannot open {tmp_path / 'out' / 'model.onnx'}:" in error
    assert ".vitkit." not in error
    with pytest.raises(DeviceError, match=r"^b of b/c$"), shown_as("/tmp/a", "b"):
        raise DeviceError("/tmp/a of /tmp/a/c")


def test_the_doctor_names_no_temporary_folder(monkeypatch):
    from vitkit import doctor

    monkeypatch.setitem(doctor._TINY, "onnx", ("model.onnx", b"not an engine"))
    with pytest.raises(BadArtifact, match=r"cannot open a tiny engine/model\.onnx"):
        doctor._run_tiny_engine("onnx")
