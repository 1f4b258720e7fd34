"""Networks from ONNX files of others: every opset and shape against torch, and each refusal by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import vitkit
from vitkit import BadInput, BadRequest, ExportFailed, exporters
from vitkit.exporters.simplify import quiet
from vitkit.runtimes.card import ImageSpec, TensorSpec
from vitkit.runtimes.image import generated_photos, prepare_batch
from vitkit.sources.card_values import CardValues
from vitkit.sources.onnx_file import load

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SAID = CardValues(mean=MEAN, std=STD)
SIZE = 32


class Squeeze(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class Convolutions(nn.Module):
    """What exporters wrote differently over the years: Clip, Pad, Resize, Squeeze, Dropout, Softmax."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8))
        self.gate = Squeeze(8)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 10))

    def forward(self, x):
        x = self.stem(x)
        y = self.up(self.down(self.gate(self.depthwise(x))))
        both = torch.cat([x, y], 1)
        return self.head(both.mean((2, 3)) + both.amax((2, 3)))


class Tokens(nn.Module):
    """A transformer whose shapes are computed from those of its input."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.norm, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, c))
        x = x + self.mlp(self.after(x))
        return self.head(x.mean(1))


NETWORKS = {"convolutions": Convolutions, "tokens": Tokens}


def network(name):
    torch.manual_seed(3)
    made = NETWORKS[name]()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    # Logits of untrained networks hardly depend on the image.
    nn.init.normal_(next(m for m in reversed(list(made.modules())) if isinstance(m, nn.Linear)).weight)
    return made.eval()


def write(made, path, opset=17, free=(), names=("logits",), size=SIZE, batch=1):
    """As torch's older exporter writes it, which has all opsets; `free` are dimensions of the input."""
    with quiet():
        torch.onnx.export(
            made,
            (torch.zeros(batch, 3, size, size),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["pixels"],
            output_names=list(names),
            dynamic_axes={"pixels": {i: f"d{i}" for i in free}, names[0]: {0: "d0"}} if free else None,
        )
    return path


def truth(made, photos, size=SIZE):
    images = prepare_batch(photos, image(size))
    with torch.inference_mode():
        return made(torch.from_numpy(images)).numpy()


def image(size=SIZE, **changes):
    spec = ImageSpec((size, size), crop_pct=1.0, mean=MEAN, std=STD, layout="NCHW", dtype="float32")
    return replace(spec, **changes)


PIXELS = {"layout": "NHWC", "dtype": "uint8"}


def run(graph, pixels):
    return onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"image": pixels})[0]


def close(got, want, limit=1e-4):
    return got.shape == want.shape and np.sqrt(np.mean((got - want) ** 2)) < limit * want.std()


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_opset_becomes_the_network_that_it_was(name, opset, tmp_path):
    made = network(name)
    source = load(write(made, tmp_path / "net.onnx", opset), SAID)
    photos = generated_photos(3, seed=5)
    assert close(source.predict(prepare_batch(photos, source.card.image))["logits"], truth(made, photos))
    graph = source.graph(replace(source.card.image, **PIXELS), 1, 20)
    onnx.checker.check_model(graph, full_check=True)
    assert {item.domain: item.version for item in graph.opset_import} == {"": 20}
    for photo, want in zip(photos, truth(made, photos), strict=True):
        assert close(run(graph, prepare_batch([photo], image(**PIXELS))), want[None])
    kinds = {node.op_type for node in graph.graph.node}
    assert not kinds & {"BatchNormalization", "Dropout", "Identity", "Constant", "Shape"}


def test_engines_of_every_target_agree_with_the_file(tmp_path, photo_folder):
    from vitkit.calibration.dataset import calibration_set

    source = load(write(network("convolutions"), tmp_path / "net.onnx", 11), SAID)
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(8, seed=6))]
    calibration = calibration_set(photo_folder, 16)
    for target, precision in (
        ("onnx", "fp32"),
        ("onnx", "fp16"),
        ("onnx", "int8"),
        ("openvino", "fp32"),
        ("openvino", "fp16"),
        ("openvino", "int8"),
        ("tensorrt", "fp16"),
    ):
        folder = tmp_path / f"{target}-{precision}"
        given = calibration if precision == "int8" else None
        artifact, checks = exporters.export(
            source, folder, target=target, precision=precision, calibration=given, images=photos
        )
        assert [check.name for check in checks] == ["golden", "images"]
        assert artifact.card.provenance["source"]["opset"] == 11
        if target != "tensorrt":
            with vitkit.open_engine(folder) as engine:
                assert engine(photos[0][1]).top


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_open_sizes_are_fixed_as_asked(name, batch, tmp_path):
    made = network(name)
    path = write(made, tmp_path / "net.onnx", 17, free=(0, 2, 3))
    with pytest.raises(BadRequest, match="--size HEIGHT,WIDTH"):
        load(path, SAID)
    source = load(path, replace(SAID, size=(48, 48)))
    photos = generated_photos(batch or 2, seed=7)
    for target in ("onnx", "openvino"):
        exporters.export(source, tmp_path / target, target=target, precision="fp32", batch=batch)
        with vitkit.open_engine(tmp_path / target) as engine:
            assert engine.card.inputs == (TensorSpec("image", (batch, 48, 48, 3), "uint8"),)
            got = engine.run({"image": engine.prepare(photos)})["logits"]
        assert close(got, truth(made, photos, 48))


def test_a_size_that_the_file_fixes_is_not_changed(tmp_path):
    path = write(network("tokens"), tmp_path / "net.onnx", free=(3,))
    with pytest.raises(BadRequest, match=r"--size is 48,48, but .*net\.onnx is made for 32,any"):
        load(path, replace(SAID, size=(48, 48)))


def test_a_batch_that_the_file_fixes_is_named(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).reshape(2, 3)

    source = load(write(Fixed(), tmp_path / "net.onnx", batch=2), SAID)
    graph = source.graph(image(**PIXELS), 2, 20)
    photos = generated_photos(3, seed=8)
    pixels = prepare_batch(photos, image(**PIXELS))
    means = prepare_batch(photos, image()).mean((2, 3))
    assert close(run(graph, pixels[:2]), means[:2])
    # The reference fills its batch up.
    assert close(source.predict(prepare_batch(photos, image()))["logits"], means)
    for batch in (1, None):
        with pytest.raises(BadRequest, match=r"made for a batch of 2: .*use --batch 2"):
            source.graph(image(**PIXELS), batch, 20)


def test_outputs_that_depend_on_the_other_images_are_noticed(tmp_path):
    class Batch(nn.Module):
        def forward(self, x):
            means = x.mean((2, 3))
            return means - means.mean(0, keepdim=True) + means[:, :1]

    source = load(write(Batch(), tmp_path / "net.onnx", free=(0,)), SAID)
    with pytest.raises(BadRequest, match=r"returns something else: 'logits' .*use --batch 1"):
        source.graph(image(**PIXELS), None, 20)


def test_a_conversion_that_changes_the_network_is_refused(tmp_path, monkeypatch):
    source = load(write(network("convolutions"), tmp_path / "net.onnx", 13), SAID)
    convert = onnx.version_converter.convert_version

    def broken(model, opset):
        converted = convert(model, opset)
        (node,) = (node for node in converted.graph.node if node.op_type == "Sigmoid")
        node.op_type = "HardSigmoid"
        return converted

    monkeypatch.setattr(onnx.version_converter, "convert_version", broken)
    with pytest.raises(ExportFailed, match="converted from opset 13 to 20 returns something else: 'logits'"):
        source.graph(image(**PIXELS), 1, 20)


@pytest.mark.parametrize("opset", [18, 22, 25])
def test_later_opsets_are_used_and_given(opset, tmp_path):
    made = network("tokens")
    later = onnx.version_converter.convert_version(onnx.load(write(made, tmp_path / "17.onnx")), 22)
    onnx.save(later, tmp_path / "net.onnx")
    source = load(tmp_path / "net.onnx", SAID)
    photos = generated_photos(1, seed=5)
    graph = source.graph(image(**PIXELS), 1, opset)
    assert close(run(graph, prepare_batch(photos, image(**PIXELS))), truth(made, photos))
    assert {item.domain: item.version for item in graph.opset_import} == {"": opset}


def test_names_are_module_paths_and_repeat(tmp_path):
    made = network("convolutions")
    source = load(write(made, tmp_path / "net.onnx", 11), SAID)
    graph = source.graph(image(**PIXELS), 1, 20).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    convolutions = {node.name.split("/")[0] for node in graph.node if node.op_type == "Conv"}
    assert convolutions == {path for path, m in made.named_modules() if isinstance(m, nn.Conv2d)}
    again = load(tmp_path / "net.onnx", SAID).graph(image(**PIXELS), 1, 20)
    assert again.SerializeToString() == source.graph(image(**PIXELS), 1, 20).SerializeToString()
    kept = replace(source, float_modules=("gate.*",))
    exporters.export(kept, tmp_path / "half", target="onnx", precision="fp16")
    typed = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "half" / "model.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.value_info}
    for node in typed.node:
        if node.op_type == "Conv":
            stays = node.name.startswith("gate.")
            assert kinds[node.output[0]] == (TensorProto.FLOAT if stays else TensorProto.FLOAT16)
    with pytest.raises(ExportFailed, match=r"the pattern 'gates' of what stays float matches no node .*gate"):
        replace(source, float_modules=("gates",)).graph(image(**PIXELS), 1, 20)


def small(nodes, weights=(), inputs=None, outputs=None, opset=17, **model):
    """A file's network from its nodes; by default of one image, x, to scores, y."""
    graph = helper.make_graph(
        nodes,
        "small",
        inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        outputs or [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    imports = [helper.make_opsetid("", opset), *model.pop("imports", ())]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **model)


def means(opset=17, before="x", after="y"):
    """(n, 3, h, w) -> the mean of each channel."""
    return [
        helper.make_node("GlobalAveragePool", [before], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], [after], axis=1),
    ]


def test_nodes_without_names_get_some(tmp_path):
    onnx.save(small([helper.make_node("Relu", ["x"], ["a"], "act"), *means(before="a")]), tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx", SAID).graph(image(8), 1, 20).graph
    assert [node.name for node in graph.node] == [
        "act/Relu",
        "GlobalAveragePool_1/GlobalAveragePool",
        "Flatten_1/Flatten",
    ]
    assert [value.name for value in (*graph.input, *graph.output)] == ["image", "y"]


@pytest.mark.parametrize(("layout", "dtype"), [("NHWC", "float32"), ("NHWC", "uint8"), ("NCHW", "uint8")])
def test_other_inputs_get_what_they_take(layout, dtype, tmp_path):
    shape = ["n", 8, 8, 3] if layout == "NHWC" else ["n", 3, 8, 8]
    kind = TensorProto.FLOAT if dtype == "float32" else TensorProto.UINT8
    nodes = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    perm = (0, 3, 1, 2) if layout == "NHWC" else (0, 1, 2, 3)
    nodes += [helper.make_node("Transpose", ["f"], ["t"], perm=perm), *means(before="t")]
    onnx.save(small(nodes, inputs=[helper.make_tensor_value_info("x", kind, shape)]), tmp_path / "m.onnx")
    source = load(tmp_path / "m.onnx", SAID if dtype == "float32" else CardValues())
    photos = generated_photos(4, seed=4)
    pixels = prepare_batch(photos, image(8, **PIXELS)).astype(np.float64)
    want = pixels.mean((1, 2))
    if dtype == "float32":
        want = (want / 255 - MEAN) / STD
    for target in ("onnx", "openvino"):
        exporters.export(source, tmp_path / target, target=target, precision="fp32")
        with vitkit.open_engine(tmp_path / target) as engine:
            assert close(engine.run_batched(engine.prepare(photos))["y"], want)
    if dtype == "uint8":
        with pytest.raises(BadRequest, match="takes uint8 pixels and normalises them itself"):
            load(tmp_path / "m.onnx", SAID)
        with pytest.raises(BadRequest, match="--input uint8"):
            exporters.export(source, tmp_path / "a", target="onnx", precision="fp32", input="float32")
    else:
        exporters.export(source, tmp_path / "a", target="onnx", precision="fp32", input="float32")
        with vitkit.open_engine(tmp_path / "a") as engine:
            assert engine.card.inputs[0].shape == (1, 3, 8, 8)
            assert close(engine.run_batched(engine.prepare(photos))["y"], want)


def test_a_softmax_is_noticed_whatever_the_output_is_called(tmp_path):
    logits = [*means(after="l"), helper.make_node("Softmax", ["l"], ["y"], axis=1)]
    onnx.save(small(logits), tmp_path / "soft.onnx")
    onnx.save(small(means()), tmp_path / "plain.onnx")
    card = load(tmp_path / "soft.onnx", SAID).card
    assert card.decode == {"probabilities": "y"}
    assert "y" in card.provenance["assumed"]["probabilities"]
    assert load(tmp_path / "plain.onnx", SAID).card.decode == {"logits": "y"}
    with pytest.raises(BadRequest, match="a softmax is missing; name it with --outputs logits"):
        load(tmp_path / "plain.onnx", replace(SAID, outputs=("probabilities",)))
    with pytest.raises(BadRequest, match="a softmax is in the network; name it with --outputs probabilities"):
        load(tmp_path / "soft.onnx", replace(SAID, outputs=("logits",)))
    named = load(tmp_path / "soft.onnx", replace(SAID, outputs=("probabilities",)))
    exporters.export(named, tmp_path / "a", target="openvino", precision="fp32")
    with vitkit.open_engine(tmp_path / "a") as engine:
        (photo,) = generated_photos(1, seed=9)
        pixels = prepare_batch([photo], image(8)).mean((2, 3))[0]
        want = np.exp(pixels) / np.exp(pixels).sum()
        assert abs(engine(photo).probability - want.max()) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.0, 0.0, 0.0)}, {"std": (1.0, 1.0, 1.0)}, {"colour": "BGR"}], ids=str
)
def test_a_wrong_preparation_is_caught_by_a_reference(wrong, tmp_path):
    path = write(network("convolutions"), tmp_path / "net.onnx")
    right, mistaken = load(path, SAID), load(path, replace(SAID, **wrong))
    photos = [(str(i), photo) for i, photo in enumerate(generated_photos(8, seed=6))]
    exporters.export(mistaken, tmp_path / "a", target="onnx", precision="fp32")
    with pytest.raises(ExportFailed, match="images: logits error"):
        exporters.verify(tmp_path / "a", right, photos)
    exporters.verify(tmp_path / "a", mistaken, photos)


def test_weights_in_other_files_go_into_the_engine(tmp_path):
    made = network("tokens")
    (tmp_path / "in").mkdir()
    onnx.save(
        onnx.load(write(made, tmp_path / "net.onnx")),
        tmp_path / "in" / "net.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    path, weights = tmp_path / "in" / "net.onnx", tmp_path / "in" / "weights.bin"
    source = load(path, SAID)
    assert set(source.card.provenance["source"]["weights"]) == {"weights.bin"}
    content = weights.read_bytes()
    weights.unlink()
    exporters.export(source, tmp_path / "a", target="onnx", precision="fp32")
    photos = generated_photos(2, seed=5)
    with vitkit.open_engine(tmp_path / "a") as engine:
        assert close(engine.run_batched(engine.prepare(photos))["logits"], truth(made, photos))
    with pytest.raises(BadInput, match=r"of which weights\.bin is missing: copy them into"):
        load(path, SAID)
    weights.write_bytes(content[:-100])
    with pytest.raises(BadInput, match=r"the weights of .* in weights\.bin cannot be read"):
        load(path, SAID)
    with weights.open("wb") as file:
        file.truncate(2_100_000_000)
    big = onnx.load(path, load_external_data=False)
    (entry,) = (item for item in big.graph.initializer[0].external_data if item.key == "length")
    entry.value = str(2_100_000_000)
    onnx.save(big, path)
    with pytest.raises(BadInput, match=r"a network of 2\.10 GB; .* end at 2 GB"):
        load(path, SAID)


def test_weights_outside_the_folder_are_not_read(tmp_path):
    (tmp_path / "in").mkdir()
    np.ones((3, 3, 1, 1), np.float32).tofile(tmp_path / "secret.bin")
    node = helper.make_node("Conv", ["x", "w"], ["c"])
    model = small([node, *means(before="c")], [("w", np.ones((3, 3, 1, 1), np.float32))])
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "../secret.bin")
    model.graph.initializer[0].ClearField("raw_data")
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="cannot be read"):
        load(tmp_path / "in" / "m.onnx", SAID)


def batch_norm(**attributes):
    weights = [(name, np.ones(3, np.float32)) for name in "sbmv"]
    outputs = ["c", "m2", "v2"] if attributes.pop("outputs", 1) > 1 else ["c"]
    return [helper.make_node("BatchNormalization", ["x", *"sbmv"], outputs, **attributes)], weights


def branch(name):
    part = helper.make_node("Identity" if name == "then" else "Neg", ["x"], [f"{name}_out"])
    return helper.make_graph(
        [part], name, [], [helper.make_tensor_value_info(f"{name}_out", 1, ["n", 3, 8, 8])]
    )


def conditional():
    return [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Greater", ["top", "zero"], ["positive"]),
        helper.make_node(
            "If", ["positive"], ["c"], "choice", then_branch=branch("then"), else_branch=branch("else")
        ),
        *means(before="c"),
    ]


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


X = value("x", TensorProto.FLOAT, ["n", 3, 8, 8])
REFUSED = {
    "custom": (
        lambda: small(
            [helper.make_node("Swirl", ["x"], ["c"], "twist", domain="acme"), *means(before="c")],
            imports=[helper.make_opsetid("acme", 1)],
        ),
        r"custom operators, acme\.Swirl \('twist'\)",
    ),
    "optimised": (
        lambda: small(
            [helper.make_node("Gelu", ["x"], ["c"], domain="com.microsoft"), *means(before="c")],
            imports=[helper.make_opsetid("com.microsoft", 1)],
        ),
        r"com\.microsoft\.Gelu .*before ONNX Runtime's optimiser",
    ),
    "unknown": (
        lambda: small([helper.make_node("ATen", ["x"], ["c"]), *means(before="c")]),
        "operators that ONNX has not in opset 17: ATen",
    ),
    "sequence": (
        lambda: small(
            [
                helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1),
                helper.make_node("ConcatFromSequence", ["parts"], ["c"], axis=1),
                *means(before="c"),
            ]
        ),
        r"SplitToSequence \('parts'\), ConcatFromSequence .*a sequence",
    ),
    "random": (
        lambda: small(
            [
                helper.make_node("RandomNormalLike", ["x"], ["r"], "noise"),
                helper.make_node("Add", ["x", "r"], ["c"]),
                *means(before="c"),
            ]
        ),
        r"RandomNormalLike \('noise'\) draws random numbers",
    ),
    "dropout": (
        lambda: small(
            [helper.make_node("Dropout", ["x", "p", "on"], ["c"]), *means(before="c")],
            [("p", np.float32(0.5)), ("on", np.array(True))],
        ),
        "Dropout .* is in training mode: export the network after model.eval",
    ),
    "batch norm": (
        lambda: small([*batch_norm(training_mode=1, outputs=3)[0], *means(before="c")], batch_norm()[1]),
        "BatchNormalization .* is in training mode",
    ),
    "quantised": (
        lambda: small(
            [
                helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "s", "z"], ["c"]),
                *means(before="c"),
            ],
            [("s", np.float32(0.1)), ("z", np.int8(0))],
        ),
        "is quantised already; .*give the float32 file",
    ),
    "two inputs": (
        lambda: small(
            [helper.make_node("Add", ["x", "more"], ["c"]), *means(before="c")],
            inputs=[X, value("more", TensorProto.FLOAT, ["n", 3, 8, 8])],
        ),
        r"2 inputs, x: float \[any, 3, 8, 8\], more: float",
    ),
    "tokens": (
        lambda: small(means(), inputs=[value("x", TensorProto.FLOAT, ["n", 16])]),
        r"takes x: float \[any, 16\]; an image input is",
    ),
    "grey": (
        lambda: small(means(), inputs=[value("x", TensorProto.FLOAT, ["n", 1, 8, 8])]),
        r"takes x: float \[any, 1, 8, 8\]; an image input is",
    ),
    "half": (
        lambda: small(means(), inputs=[value("x", TensorProto.FLOAT16, ["n", 3, 8, 8])]),
        "images are float32 or uint8: export it in float32",
    ),
    "half weights": (
        lambda: small(
            [
                helper.make_node("Cast", ["w"], ["wide"], to=1),
                helper.make_node("Conv", ["x", "wide"], ["c"]),
                *means(before="c"),
            ],
            [("w", np.ones((3, 3, 1, 1), np.float16))],
        ),
        "1 weights in float16, such as 'w'.*model.float",
    ),
    "double weights": (
        lambda: small(
            [
                helper.make_node("Cast", ["w"], ["wide"], to=1),
                helper.make_node("Conv", ["x", "wide"], ["c"]),
                *means(before="c"),
            ],
            [("w", np.ones((3, 3, 1, 1)))],
        ),
        "1 weights in float64, such as 'w'.*model.float",
    ),
    "old": (lambda: small(means(), opset=8), "has opset 8; files of opset 9 and later"),
    "new": (lambda: small(means(), opset=99), "has opset 99, .*pip install --upgrade onnx"),
    "places": (
        lambda: small(
            [helper.make_node("NonZero", ["x"], ["y"])], outputs=[value("y", TensorProto.INT64, [4, "k"])]
        ),
        "no tensor whose first dimension is that of the 2 images",
    ),
    "found": (
        lambda: small(
            [
                helper.make_node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
                helper.make_node("ReduceMean", ["m"], ["threshold"], keepdims=0),
                helper.make_node("Greater", ["m", "threshold"], ["over"]),
                helper.make_node("ReduceMax", ["x"], ["top"], axes=[0, 2, 3], keepdims=0),
                helper.make_node("Greater", ["top", "zero"], ["kept"]),
                helper.make_node("Compress", ["m", "kept"], ["y"], axis=1),
            ],
            [("zero", np.float32(1.9))],
            outputs=[value("y", TensorProto.FLOAT, ["n", "k"])],
        ),
        "'y' has a size that depends on the images",
    ),
    "truth values": (
        lambda: small(
            [*means(after="m"), helper.make_node("Greater", ["m", "zero"], ["y"])],
            [("zero", np.float32(0))],
            outputs=[value("y", TensorProto.BOOL, ["n", 3])],
        ),
        "the output 'y' is bool; engines return",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_engine_takes_is_refused_by_name(kind, tmp_path):
    make, words = REFUSED[kind]
    (tmp_path / "m.onnx").write_bytes(make().SerializeToString())
    with pytest.raises((BadInput, BadRequest), match=words):
        load(tmp_path / "m.onnx", SAID)


def test_a_branch_that_depends_on_the_image_is_refused_and_a_constant_one_taken(tmp_path):
    onnx.save(small(conditional(), [("zero", np.float32(0))]), tmp_path / "m.onnx")
    source = load(tmp_path / "m.onnx", SAID)
    with pytest.raises(ExportFailed, match=r"control flow that depends on the image, If \('choice'"):
        source.graph(image(8), 1, 20)
    shaped = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["channels"]),
        helper.make_node("Equal", ["channels", "three"], ["positive"]),
        *conditional()[2:],
    ]
    constants = [("one", np.array(1)), ("three", np.array(3))]
    onnx.save(small(shaped, constants), tmp_path / "m.onnx")
    graph = load(tmp_path / "m.onnx", SAID).graph(image(8), 1, 20).graph
    assert [node.op_type for node in graph.node] == ["GlobalAveragePool", "Flatten"]


@pytest.mark.parametrize("content", [b"", b"not a network", b"\x08\x08\x12\x00" + bytes(100)])
def test_what_is_no_onnx_file_is_refused(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(BadInput, match=r"m\.onnx is no ONNX file"):
        load(tmp_path / "m.onnx", SAID)
    with pytest.raises(BadInput, match="cannot read"):
        load(tmp_path / "absent.onnx", SAID)


def test_a_file_beyond_the_limit_of_protocol_buffers_is_refused(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(2_200_000_000)
    with pytest.raises(BadInput, match=r"2\.20 GB; .* end at 2 GB"):
        load(tmp_path / "m.onnx", SAID)


def test_functions_of_the_file_are_written_out(tmp_path):
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("acme", "Gate", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Gate", ["x"], ["c"], domain="acme"), *means(before="c")]
    imports = [helper.make_opsetid("acme", 1)]
    onnx.save(small(nodes, imports=imports, functions=[function]), tmp_path / "m.onnx")
    source = load(tmp_path / "m.onnx", SAID)
    kinds = [node.op_type for node in source.graph(image(8), 1, 20).graph.node]
    assert kinds == ["Relu", "GlobalAveragePool", "Flatten"]


def test_tflite_is_refused_with_the_way(tmp_path):
    source = load(write(network("tokens"), tmp_path / "net.onnx"), SAID)
    with pytest.raises(BadRequest, match="give the torch module that the file was made from"):
        exporters.export(source, tmp_path / "a", target="tflite", precision="fp32")
    assert not (tmp_path / "a").exists()


def test_a_missing_mean_is_asked_for(tmp_path):
    path = write(network("tokens"), tmp_path / "net.onnx")
    with pytest.raises(BadRequest, match=r"add --mean .*; and --std"):
        load(path, CardValues())
