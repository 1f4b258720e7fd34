"""Networks from outside: each kind of source, what it says of its card, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED
from torch import nn

import vitkit
from vitkit.cli.import_ import import_
from vitkit.runs import load_run
from vitkit.runtimes.card import ImageSpec, TensorSpec, write_card
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest
from vitkit.runtimes.image import generated_photos, prepare, prepare_batch, read_image
from vitkit.runtimes.listing import find_images
from vitkit.sources import CardValues, build_card, parse_word, read_card_values, resolve
from vitkit.sources.card_values import read_labels
from vitkit.torchvision_shim import timm

SAID = CardValues(size=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.drop(self.stem(x).mean((2, 3))))

def broken():
    raise ValueError("no such\\nweights")

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(CODE)
    return path


# The values of cards


def test_the_left_values_win_and_labels_bring_their_ids():
    first = CardValues(size=(1, 2), labels=("a",))
    second = CardValues(size=(3, 4), colour="BGR", labels=("b",), label_ids=("n1",))
    assert first.over(second) == CardValues(size=(1, 2), colour="BGR", labels=("a",))
    assert CardValues().over(second) == second


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": (224,)}, "--size is [224]"),
        ({"size": (0, 4)}, "a side of --size is 0"),
        ({"mean": (0.5, 0.5)}, "--mean"),
        ({"std": (0.0, 1.0, 1.0)}, "--std is 0.0"),
        ({"colour": "rgb"}, "--colour is 'rgb'"),
        ({"fit": "squash"}, "--fit is 'squash'; known are cover, contain, stretch"),
        ({"crop_pct": 87.5}, "--crop-pct is 87.5"),
        ({"interpolation": "lanczos"}, "--interpolation is 'lanczos'"),
        ({"task": "detection"}, "--task is 'detection'"),
        ({"labels": ("a", "")}, "--labels holds ''"),
        ({"outputs": ("a", "a")}, "twice"),
        ({"labels": ("a", "b"), "label_ids": ("1",)}, "2 labels, but 1 label_ids"),
    ],
)
def test_a_bad_value_is_refused_by_its_flag(values, words):
    with pytest.raises(BadRequest) as caught:
        CardValues(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["size", "mean", "std"])
def test_what_is_never_assumed(name):
    from dataclasses import replace

    with pytest.raises(BadRequest, match=f"add --{name}"):
        replace(SAID, **{name: None}).image()


def test_what_is_assumed_is_in_the_provenance_and_what_is_said_is_not(tmp_path):
    outputs = [TensorSpec("scores", (None, 3), "float32")]
    card = build_card("net", SAID, outputs, {"source": {"file": "x"}})
    assumed = card.provenance["assumed"]
    assert set(assumed) == {"colour", "fit", "crop_pct", "interpolation", "task", "labels"}
    assert (card.task, card.labels, card.decode) == ("classification", ("0", "1", "2"), {"logits": "scores"})
    assert card.image.size == (32, 48)
    write_card(card, tmp_path)
    said = CardValues(
        colour="BGR", fit="stretch", crop_pct=0.9, interpolation="nearest", task="classification",
        labels=("a", "b", "c"),
    )  # fmt: skip
    assert build_card("net", said.over(SAID), outputs, {}).provenance["assumed"] == {}


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (("background", "a", "b", "c"), "4 labels, but 3 classes"),
        (("background", "a", "b", "c"), "the first is 'background'"),
        (("a", "b"), "class 0 is a background"),
        (("a",), "one label for each of the 3 classes"),
    ],
)
def test_labels_that_are_off(labels, words):
    with pytest.raises(BadRequest) as caught:
        build_card(
            "net", CardValues(labels=labels).over(SAID), [TensorSpec("logits", (None, 3), "float32")], {}
        )
    assert words in str(caught.value)


def test_a_task_needs_its_output():
    outputs = [TensorSpec("boxes", (None, 9, 4), "float32")]
    with pytest.raises(BadRequest, match="--task tensors takes any"):
        build_card("net", CardValues(task="classification").over(SAID), outputs, {})


def test_a_toml_gives_values_and_names_its_faults(tmp_path):
    path = tmp_path / "mine.toml"
    (tmp_path / "names.txt").write_text("tench \ngoldfish\n\n")
    path.write_text('size = 96\nmean = [0, 0.5, 1]\nlabels = "names.txt"\noutputs = ["y"]\n')
    found = read_card_values(path)
    assert found == CardValues(size=(96, 96), mean=(0, 0.5, 1), labels=("tench", "goldfish"), outputs=("y",))
    for text, words in (
        ("sizes = 3", "unknown name 'sizes'"),
        ("std = [0, 0, 0]", "--std"),
        ("size = [", "cannot be read as TOML"),
        ('labels = "none.txt"', "none.txt cannot be read"),
        ("mean = 0.5", "--mean"),
    ):
        path.write_text(text)
        with pytest.raises(BadInput) as caught:
            read_card_values(path)
        assert words in str(caught.value)


def test_labels_from_json(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"1": ["n2", "goldfish"], "0": ["n1", "tench"]}')
    assert read_labels(path) == CardValues(labels=("tench", "goldfish"), label_ids=("n1", "n2"))
    path.write_text('["a", "b"]')
    assert read_labels(path) == CardValues(labels=("a", "b"))
    for text in ('{"1": "a", "2": "b"}', '["a", 3]', "[]", "3"):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"labels\.json"):
            read_labels(path)


def test_stretch_scales_both_sides():
    photo = generated_photos(1, size=(40, 90))[0]
    from PIL import Image

    wanted = np.asarray(Image.fromarray(photo).resize((48, 32), Image.Resampling.BILINEAR))
    spec = ImageSpec((32, 48), fit="stretch", interpolation="bilinear")
    np.testing.assert_array_equal(prepare(photo, spec), wanted)


# Words


@pytest.mark.parametrize(
    ("word", "kind", "name"),
    [
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm", "vit_tiny_patch16_224.augreg_in21k"),
        ("timm:resnet18=weights/best.pth", "timm", "resnet18"),
        ("hf:a/segformer", "hf", "segformer"),
        ("a/model.pt2", "program", "model"),
        ("a/model.py:make", "factory", "make"),
        ("package.module:Net", "factory", "Net"),
        ("runs/best", "run", "best"),
    ],
)
def test_words_are_taken_apart(word, kind, name):
    found = parse_word(word)
    assert (found.kind, found.name) == (kind, name)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("timm:mobilenetv4_conv_smal", "mobilenetv4_conv_small"),
        ("timm:resnet18=none.pth", "none.pth does not exist"),
        ("hf:none", "none does not exist"),
        ("none.pt2", "none.pt2 does not exist"),
        ("none.py:make", "none.py does not exist"),
        ("no_such_package.module:make", "no module 'no_such_package.module'"),
        ("mobilenetv3_large_100", "timm:NAME"),
    ],
)
def test_a_word_that_names_nothing(word, words):
    given = CardValues() if word.startswith("mobilenet") else SAID
    with pytest.raises(BadRequest) as caught:
        resolve(word, given, untrained=word == "timm:mobilenetv4_conv_smal")
    assert words in str(caught.value)


def test_a_bad_card_is_refused_before_torch_is_imported(file, tmp_path):
    code = (
        "import sys\nfrom vitkit.cli.main import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\n"
        "except Exception as error:\n    print(error)\n"
        "print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "export", f"{file}:Net", "--target", "onnx", "-o", tmp_path / "a"]
    for flags, words in (
        ([], "add --size"),
        (["--size", "32"], "--mean"),
        (["--size", "32,a"], "--size is '32,a'"),
        (["--size", "32", "--mean", "0", "--std", "0"], "--std"),
    ):
        run = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert words in run.stdout, run.stderr
        assert run.stdout.rstrip().endswith("False")


# timm


def test_a_network_of_timm_has_the_card_of_its_configuration():
    name = "mobilenetv4_conv_small.e2400_r224_in1k"
    source = resolve(f"timm:{name}", CardValues(mean=(0.5, 0.5, 0.5)), untrained=True)
    config = timm.get_pretrained_cfg(name)
    card = source.card
    assert card.image.size == config.input_size[1:]
    assert (card.image.crop_pct, card.image.interpolation) == (config.crop_pct, config.interpolation)
    assert (card.image.mean, card.image.std) == ((0.5, 0.5, 0.5), config.std)
    assert (card.labels[1].split(",")[0], card.label_ids[1]) == ("goldfish", "n01443537")
    assert card.provenance["assumed"] == {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(name).eval()
    inputs = prepare_batch(generated_photos(2), card.image)
    with torch.no_grad():
        wanted = network(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(source.predict(inputs)["logits"], wanted, atol=1e-5)


def test_weights_in_a_file_with_their_own_number_of_classes(tmp_path):
    from safetensors.torch import save_file

    network = timm.create_model("test_vit", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "w.pth")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        source = resolve(f"timm:test_vit={path}", CardValues(std=(1.0, 1.0, 1.0)))
        assert source.card.labels == tuple("0123456")
        assert "labels" in source.card.provenance["assumed"]
        inputs = prepare_batch(generated_photos(2), source.card.image)
        with torch.no_grad():
            wanted = network(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(source.predict(inputs)["logits"], wanted, atol=1e-5)
    with pytest.raises(BadInput, match="does not hold the weights of timm's test_resnet"):
        resolve(f"timm:test_resnet={tmp_path / 'w.pth'}")


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_are_never_unpickled(tmp_path):
    torch.save({"weights": Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(BadInput, match="without running its code"):
        resolve(f"timm:test_vit={tmp_path / 'w.pth'}")
    assert not (tmp_path / "ran").exists()


def test_an_imported_network_of_timm_is_a_run(tmp_path):
    network = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    import_(Path(f"timm:test_vit={tmp_path / 'w.pth'}"), out=tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.card.labels == tuple("0123456")
    inputs = prepare_batch(generated_photos(2), run.card.image)
    with torch.no_grad():
        wanted = network(torch.from_numpy(inputs)).numpy()
    np.testing.assert_array_equal(resolve(str(tmp_path / "run")).predict(inputs)["logits"], wanted)
    with pytest.raises(BadRequest, match="no option but -o"):
        import_(Path("timm:test_vit"), format="psvit")
    with pytest.raises(BadRequest, match="--format and --model"):
        import_(tmp_path / "w.pth")
    body = json.loads((tmp_path / "run" / "card.json").read_text())
    body["provenance"]["source"]["classes"] = 8
    (tmp_path / "run" / "card.json").write_text(json.dumps(body))
    with pytest.raises(BadArtifact, match="whole run"):
        load_run(tmp_path / "run")


def test_another_size_of_a_vision_transformer():
    source = resolve("timm:test_vit", CardValues(size=(96, 64)), untrained=True)
    assert source.predict(prepare_batch(generated_photos(2), source.card.image))["logits"].shape == (2, 1000)


def test_features_of_timm_are_no_classes():
    network = timm.create_model("test_resnet", num_classes=0).eval()
    with pytest.raises(BadRequest, match="--task"):
        vitkit.wrap(network, task="semantic")


# Functions


def test_a_function_in_a_file(file, caplog):
    with caplog.at_level("INFO", "vitkit"):
        source = resolve(f"{file}:Net", SAID)
    assert "running your code" in caplog.text
    assert source.card.name == "Net"
    assert source.card.provenance["source"] == {"factory": "my_net.py:Net"}
    # A class makes a module in training mode; that it was changed is recorded.
    assert "eval()" in source.card.provenance["assumed"]["mode"]
    assert source.predict(prepare_batch(generated_photos(2), source.card.image))["logits"].shape == (2, 5)


def test_a_function_of_a_package_in_the_current_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    file.rename(file.parent / "another_net.py")
    assert resolve("another_net:Net", SAID).card.name == "Net"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken", "calling .*broken failed: ValueError: no such .my_net.py, line 17."),
        ("number", "'number' in .* is not callable; it has Net, broken"),
        ("missing", "'missing' in .* does not exist"),
    ],
)
def test_a_function_that_does_not_make_a_network(file, name, words):
    with pytest.raises(BadRequest, match=words):
        resolve(f"{file}:{name}", SAID)


# Exported programs


@pytest.fixture
def programs(tmp_path, file):
    network = resolve(f"{file}:Net", SAID).module.network
    example = (torch.zeros(2, 3, 32, 48),)
    free = torch.export.export(network, example, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(free, tmp_path / "free.pt2")
    torch.export.save(torch.export.export(network, (example[0][:1],)), tmp_path / "one.pt2")
    torch.export.save(torch.export.export(network, example), tmp_path / "two.pt2")
    return network, tmp_path


@pytest.mark.parametrize("name", ["free", "one"])
def test_a_program_is_its_network_under_its_module_paths(programs, name):
    network, folder = programs
    source = resolve(str(folder / f"{name}.pt2"), CardValues(mean=(0.0,) * 3, std=(1.0,) * 3))
    assert source.card.image.size == (32, 48)
    inputs = prepare_batch(generated_photos(3), source.card.image)
    with torch.no_grad():
        wanted = network(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(source.predict(inputs)["logits"], wanted, atol=1e-5)
    assert {"stem.0", "stem.2", "head"} <= {path for path, _ in source.module.network.named_modules()}


def test_a_program_of_another_form(programs):
    _, folder = programs
    with pytest.raises(BadRequest, match="exported for 2 images at a time"):
        resolve(str(folder / "two.pt2"), SAID)
    with pytest.raises(BadRequest, match="takes images of 32,48; leave out --size"):
        resolve(str(folder / "one.pt2"), CardValues(size=(64, 64)).over(SAID))
    last = torch.export.export(nn.Flatten(), (torch.zeros(1, 8, 8, 3),))
    torch.export.save(last, folder / "last.pt2")
    with pytest.raises(BadRequest, match=r"x\.permute\(0, 3, 1, 2\)"):
        resolve(str(folder / "last.pt2"), SAID)
    (folder / "text.pt2").write_text("no program")
    with pytest.raises(BadInput, match="no exported program"):
        resolve(str(folder / "text.pt2"), SAID)


def rewritten(path: Path, change) -> Path:
    """A copy of an archive; `change(name, content)` gives the new content of each member."""
    copy = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return copy


def test_a_program_is_never_unpickled(programs):
    _, folder = programs
    payload = pickle.dumps(Payload(folder / "ran"))

    def as_inputs(name, content):
        return payload if name.endswith("sample_inputs/model.pt") else content

    def as_weights(name, content):
        if name.endswith("weights_config.json"):
            body = json.loads(content)
            for entry in body["config"].values():
                entry["use_pickle"] = True
            return json.dumps(body)
        return payload if "/weights/weight_" in name else content

    def as_size(name, content):
        if name.endswith("models/model.json"):
            code = f"__import__('os').mkdir('{folder / 'ran'}')"
            return content.replace(b"Symbol('s", code.encode() + b" or Symbol('s")
        return content

    for change, words in (
        (as_inputs, "sample_inputs/model.pt cannot be read without running its code"),
        (as_weights, "whose loading runs code"),
        (as_size, "as a size, which is no arithmetic"),
    ):
        with pytest.raises(BadInput, match=words):
            resolve(str(rewritten(folder / "free.pt2", change)), SAID)
        assert not (folder / "ran").exists()
    with zipfile.ZipFile(folder / "free.pt2", "a") as archive:
        archive.writestr("free/data/aotinductor/model/model.so", b"code")
    with pytest.raises(BadInput, match="aotinductor"):
        resolve(str(folder / "free.pt2"), SAID)


# transformers


@pytest.fixture
def checkpoint(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.ViTForImageClassification(config).eval()
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_std=[0.5, 0.4, 0.3])
    folder = tmp_path / "vit"
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, network, processor


def test_a_checkpoint_of_transformers_has_its_own_labels_and_preparation(checkpoint):
    folder, network, processor = checkpoint
    source = resolve(f"hf:{folder}")
    assert source.card.labels == ("cat", "dog", "owl")
    assert source.card.provenance["assumed"] == {}
    assert source.module.output_names == ("logits",)
    photos = generated_photos(2)
    theirs = processor(photos, return_tensors="pt")["pixel_values"].numpy()
    ours = prepare_batch(photos, source.card.image)
    # A grey level is 1/255 over the smallest std, 0.3.
    assert np.abs(ours - theirs).max() <= 1.01 / 255 / 0.3
    with torch.no_grad():
        wanted = network(torch.from_numpy(theirs)).logits.numpy()
    np.testing.assert_allclose(source.predict(theirs)["logits"], wanted, atol=1e-5)


NAMES = {i: f"class {i}" for i in range(6)}
SEGMENTERS = {
    "Segformer": (
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1] * 4,
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 32,
        },
        "Segformer",
        {"size": {"height": 64, "width": 96}},
    ),
    "MobileViTV2": (
        {"image_size": 64, "width_multiplier": 0.5, "aspp_out_channels": 32},
        "MobileViT",
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
}


@pytest.mark.parametrize("name", SEGMENTERS)
def test_label_maps_are_those_of_transformers_own_post_processing(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    options, processor, preparation = SEGMENTERS[name]
    config = getattr(transformers, f"{name}Config")(
        **options, id2label=NAMES, label2id={label: i for i, label in NAMES.items()}
    )
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForSemanticSegmentation")(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                # Untrained, it would give all pixels one class.
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5)
    processor = getattr(transformers, f"{processor}ImageProcessor")(**preparation)
    network.save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    artifact = vitkit.export(f"hf:{tmp_path / 'net'}", tmp_path / "engine", target="onnx")
    assert (artifact.card.task, artifact.card.labels) == ("semantic", tuple(NAMES.values()))
    seen = set()
    with vitkit.open_engine(artifact.path) as engine, torch.no_grad():
        # Of the crop's shape, since transformers' own maps know nothing of a crop.
        for photo in generated_photos(3, seed=2, size=(120, 120) if name == "MobileViTV2" else (110, 170)):
            inputs = processor(photo, return_tensors="pt")
            ours = prepare_batch([photo], resolve(f"hf:{tmp_path / 'net'}").card.image)
            assert np.abs(ours - inputs["pixel_values"].numpy()).max() < 0.03
            outputs = network(torch.from_numpy(ours))
            (wanted,) = processor.post_process_semantic_segmentation(outputs, [photo.shape[:2]])
            np.testing.assert_array_equal(engine(photo).classes, wanted.numpy())
            seen |= set(wanted.unique().tolist())
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("options", "image"),
    [
        (
            {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
            {"fit": "cover", "crop_pct": 0.8},
        ),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}),
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
            {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        ),
        ({"do_flip_channel_order": True, "resample": 3}, {"colour": "BGR", "interpolation": "bicubic"}),
    ],
)
def test_what_processors_say_of_images(options, image):
    from vitkit.sources.huggingface import _image

    body = {
        "size": {"height": 32, "width": 32},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "resample": 2,
    }
    found = _image({**body, **options})
    for name, value in image.items():
        wanted = value if isinstance(value, str) else pytest.approx(value)
        assert getattr(found, name) == wanted


def test_a_checkpoint_that_is_not_taken(checkpoint):
    folder, *_ = checkpoint
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"architectures": ["BertForMaskedLM"]}, "is a checkpoint of BertForMaskedLM"),
        ({"auto_map": {"AutoModel": "code.Net"}}, "brings its own code"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises((BadInput, BadRequest), match=words):
            resolve(f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="unpickles nothing"):
        resolve(f"hf:{folder}")


# Python


def test_export_verify_evaluate_and_bench_from_python(file, tmp_path):
    network = resolve(f"{file}:Net", SAID).module.network
    image = ImageSpec((32, 48), mean=SAID.mean, std=SAID.std, interpolation="bilinear")
    source = vitkit.wrap(network, image=image, labels=list("abcde"))
    artifact = vitkit.export(source, tmp_path / "engine", target="onnx")
    assert artifact.card.labels == tuple("abcde")
    assert artifact.card.provenance["assumed"] == {"task": "classification"}
    assert [check.problems for check in vitkit.verify(artifact.path, source)] == [(), ()]
    photos = generated_photos(10, seed=3)
    with vitkit.open_engine(artifact.path) as engine, torch.no_grad():
        for photo in photos:
            inputs = torch.from_numpy(prepare_batch([photo], source.card.image))
            assert engine(photo).top[0].index == int(network(inputs).argmax())
    from PIL import Image

    for i, photo in enumerate(photos):
        (tmp_path / "data" / "abcde"[i % 5]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo).save(tmp_path / "data" / "abcde"[i % 5] / f"{i}.png")
    found = [vitkit.evaluate(each, tmp_path / "data").summary() for each in (source, artifact.path)]
    assert found[0]["images"] == 10
    assert found[0] == found[1]
    from vitkit.bench import BenchOptions

    (report,) = vitkit.bench(artifact.path, BenchOptions(duration=0.01, scopes=("engine",)))
    assert report.times_ns


def test_a_module_is_refused_with_what_to_pass(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BadRequest, match=r"network\.eval\(\)"):
        vitkit.export(network, tmp_path / "a", target="onnx", image=ImageSpec((32, 32)))
    with pytest.raises(BadRequest, match="--size"):
        vitkit.export(network.eval(), tmp_path / "a", target="onnx")
    with pytest.raises(BadRequest, match="ImageSpec"):
        vitkit.wrap(network, image=(32, 32))
    with pytest.raises(BadRequest, match="list of texts"):
        vitkit.wrap(network, image=ImageSpec((32, 32)), labels="abcd")
    assert not (tmp_path / "a").exists()


def test_real_weights_give_the_same_class_on_every_photo(real_photos, tmp_path):
    path = SHARED / "weights" / "mobilenet_v3_small_imagenet_rot180.pth"
    if not path.is_file():
        pytest.skip(f"the weights are not at {path}")
    import_module("vitkit.torchvision_shim")
    torchvision = import_module("torchvision")

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = torchvision.models.mobilenet_v3_small()
            self.network.load_state_dict(torch.load(path, weights_only=True))

        def forward(self, x):
            return self.network(x.flip(-1, -2))

    network = Turned().eval()
    with (real_photos / "classes.csv").open(newline="") as file:
        classes = {row["wnid"]: int(row["index"]) for row in csv.DictReader(file)}
    files = find_images(real_photos)[::5]
    truth = [classes[file.parent.name] for file in files]
    image = ImageSpec((224, 224), crop_pct=0.875, interpolation="bilinear")
    artifact = vitkit.export(network, tmp_path / "engine", target="openvino", image=image)
    prepare_torch = torchvision.transforms.v2.Compose(
        [torchvision.transforms.v2.Resize(256), torchvision.transforms.v2.CenterCrop(224)]
    )
    from PIL import Image

    hits = []
    with vitkit.open_engine(artifact.path) as engine, torch.no_grad():
        for file, right in zip(files, truth, strict=True):
            photo = read_image(file)
            pixels = torch.from_numpy(np.array(prepare_torch(Image.fromarray(photo))))
            x = (pixels.permute(2, 0, 1) / 255 - torch.tensor(image.mean)[:, None, None]) / torch.tensor(
                image.std
            )[:, None, None]
            found = int(network(x[None]).argmax())
            assert engine(photo).top[0].index == found, file
            hits.append(found == right)
    assert np.mean(hits) > 0.7
