"""Semantic segmentation and raw tensors on the command line: evaluate, predict, inspect, report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from vitkit import BadArtifact, BadInput, BadRequest
from vitkit.cli.main import app
from vitkit.data.coco import Category
from vitkit.data.coco.ids import describe_segments
from vitkit.data.coco.write import NewImage, write_panoptic_set
from vitkit.evaluate.semantic import Overlap, paired_files, read_label_map
from vitkit.report.results import read_results
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, write_card

SIDE = 48
LABELS = ("road", "car", "sky")
COLOURS = np.array([(110, 110, 110), (220, 30, 30), (150, 210, 250)], np.uint8)


def engine_of(folder: Path, task: str = "semantic", **changes) -> Path:
    """An artifact that gives every pixel the class of the nearest colour; or its logits as tensors."""
    colours = COLOURS.astype(np.float32)
    # Of -|x - c|^2 the part that the classes do not share.
    weights = {"weight": 0.004 * colours[:, :, None, None], "bias": -0.002 * (colours**2).sum(axis=1)}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["pixels", "weight", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, SIDE, SIDE, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [numpy_helper.from_array(np.float32(value), name) for name, value in weights.items()],
    )
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        folder / "model.onnx",
    )
    fields = {
        "name": "colours",
        "task": task,
        "target": "onnx",
        "precision": "fp32",
        "inputs": (TensorSpec("image", (1, SIDE, SIDE, 3), "uint8"),),
        "outputs": (TensorSpec("logits", (1, 3, SIDE, SIDE), "float32"),),
        "image": ImageSpec((SIDE, SIDE), fit="stretch", interpolation="nearest"),
        "labels": LABELS if task == "semantic" else (),
        "engine": "model.onnx",
        "files": {"model.onnx": None},
    }
    write_card(ModelCard(**{**fields, **changes}), folder)
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return engine_of(tmp_path_factory.mktemp("engines") / "colours")


def scene(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Classes (H, W): sky over road with a car on it."""
    rng = np.random.default_rng(seed)
    height, width = size
    classes = np.full(size, 2)
    classes[height // 2 + int(rng.integers(-5, 5)) :] = 0
    left = int(rng.integers(2, width // 2))
    classes[height // 2 : height // 2 + 12, left : left + 15] = 1
    return classes


def write_truth(folder: Path, truths: dict[str, np.ndarray], shown: dict[str, np.ndarray]) -> Path:
    """Images that show classes, and label maps of their truth."""
    for name, classes in truths.items():
        for kind, pixels in (("images", COLOURS[shown[name]]), ("labels", classes.astype(np.uint8))):
            path = folder / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return folder


def run(*arguments):
    """Standard output of a command in this process; what it raises is raised here."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def evaluate(engine: Path, data: Path, *options) -> dict:
    return json.loads(run("evaluate", engine, "--data", data, "--json", *options))


# --- evaluate ------------------------------------------------------------------------------------------


def iou_by_sets(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int) -> dict[int, float]:
    """IoU of each class that occurs, from the sets of its pixels in the truth and in the prediction."""
    found = {}
    for index in range(classes):
        true, predicted = set(), set()
        for number, (truth, result) in enumerate(pairs):
            for place, (a, b) in enumerate(zip(truth.ravel().tolist(), result.ravel().tolist(), strict=True)):
                if a >= 0:
                    true |= {(number, place)} if a == index else set()
                    predicted |= {(number, place)} if b == index else set()
        if true | predicted:
            found[index] = 100 * len(true & predicted) / len(true | predicted)
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), classes=st.integers(2, 6), images=st.integers(1, 3))
def test_miou_is_that_of_sets(seed, classes, images):
    rng = np.random.default_rng(seed)
    pairs = [
        (
            rng.integers(-1, classes, (5, 7)).astype(np.int32),
            rng.integers(-1, classes - 1, (5, 7)).astype(np.int32),
        )
        for _ in range(images)
    ]
    overlap = Overlap(classes)
    for truth, result in pairs:
        overlap.add(truth, result)
    report = overlap.report("data", images, [f"c{i}" for i in range(classes)])
    expected = iou_by_sets(pairs, classes)
    assert {name: part.iou for name, part in report.classes.items()} == pytest.approx(
        {f"c{i}": iou for i, iou in expected.items()}
    )
    assert report.miou == pytest.approx(np.mean(list(expected.values())))
    truth, result = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in range(2))
    assert report.pixel_accuracy == pytest.approx(100 * np.mean((truth == result)[truth >= 0]))


def test_a_network_that_is_always_right(engine, tmp_path):
    truths = {f"{folder}/{i}": scene(i) for i in range(2) for folder in ("a", "b")}
    body = evaluate(engine, write_truth(tmp_path / "data", truths, truths))
    assert (body["metric"], body["value"], body["miou"], body["images"]) == ("mIoU", 100, 100, 4)
    assert set(body["classes"]) == set(LABELS)


def test_figures_of_a_network_that_errs(engine, tmp_path):
    truths, shown = ({str(i): scene(i + seed) for i in range(3)} for seed in (0, 50))
    for truth in truths.values():
        truth[:4, :9] = 255
    body = evaluate(engine, write_truth(tmp_path / "data", truths, shown))
    pairs = [(np.where(truths[name] == 255, -1, truths[name]), shown[name]) for name in truths]
    expected = iou_by_sets(pairs, 3)
    assert {name: part["iou"] for name, part in body["classes"].items()} == pytest.approx(
        {LABELS[i]: iou for i, iou in expected.items()}
    )
    assert body["value"] == pytest.approx(np.mean(list(expected.values())))
    table = run("evaluate", engine, "--data", tmp_path / "data")
    assert f"mIoU {body['value']:.2f} %" in table
    assert "car" in table


def test_truth_at_the_size_of_the_image(engine, tmp_path):
    truths = {"a": np.kron(scene(1), np.ones((3, 2), int))}
    data = write_truth(tmp_path / "data", truths, truths)
    assert evaluate(engine, data)["value"] > 97


def test_what_a_crop_leaves_out_is_missed(tmp_path):
    cropping = engine_of(
        tmp_path / "engine", image=ImageSpec((SIDE, SIDE), fit="cover", crop_pct=1.0, interpolation="nearest")
    )
    truth = np.zeros((SIDE, 2 * SIDE), int)
    truth[:, SIDE // 2 : SIDE] = 2
    body = evaluate(cropping, write_truth(tmp_path / "data", {"a": truth}, {"a": truth}))
    assert body["classes"]["sky"]["iou"] == 100
    assert body["classes"]["road"]["iou"] == pytest.approx(100 / 3)


def test_a_panoptic_set_is_truth_too(engine, tmp_path):
    categories = tuple(
        Category(number, name, name == "car", (number, 0, 0))
        for number, name in ((3, "sky"), (5, "tree"), (7, "car"), (9, "road"))
    )
    numbers = np.array([9, 7, 3])
    truths = {i: scene(i) for i in range(2)}

    def samples():
        for i, classes in truths.items():
            ids = numbers[classes]
            ids[:2] = 0
            # A tree, of which the network knows nothing.
            ids[-3:] = 5
            segments = describe_segments(ids, {n: n for n in (3, 5, 7, 9)})
            yield NewImage(i + 1, f"{i + 1:012}.png", COLOURS[classes], ids, segments)

    write_panoptic_set(tmp_path / "set", categories, {"val": samples(), "train": []})
    body = evaluate(engine, tmp_path / "set", "--split", "val")
    pairs = []
    for classes in truths.values():
        truth = classes.copy()
        truth[:2] = -1
        truth[-3:] = 3
        pairs.append((truth, classes))
    expected = iou_by_sets(pairs, 4)
    names = (*LABELS, "tree")
    assert {name: part["iou"] for name, part in body["classes"].items()} == pytest.approx(
        {names[i]: iou for i, iou in expected.items()}
    )
    assert body["classes"]["tree"]["iou"] == 0


@pytest.mark.parametrize(
    ("mode", "values"),
    [("L", [0, 1, 2, 255]), ("P", [0, 1, 2, 255]), ("I;16", [0, 1, 2, 255]), ("1", [0, 1, 1, 0])],
)
def test_label_maps_of_every_kind(tmp_path, mode, values):
    path = tmp_path / "a.png"
    pixels = np.array([values], np.uint16 if mode == "I;16" else np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels, "L").convert("P")
        image.putdata(values)
        image.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    elif mode == "1":
        image = Image.fromarray(pixels * 255).convert("1")
    else:
        image = Image.fromarray(pixels)
    image.save(path)
    assert read_label_map(path, 3).tolist() == [[-1 if value == 255 else value for value in values]]


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_few_bits_keeps_its_indices(tmp_path, bits):
    """Pillow spreads such values over 0..255; written by hand, since it writes none."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    row = 0b00_01_10_00 if bits == 2 else 0x12
    width = 8 // bits
    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    data = zlib.compress(bytes([0, row]))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert read_label_map(tmp_path / "a.png", 3).tolist() == [[0, 1, 2, 0] if bits == 2 else [1, 2]]


def test_with_more_classes_than_8_bits_255_is_one(tmp_path):
    Image.fromarray(np.array([[255, 299, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_label_map(tmp_path / "a.png", 300).tolist() == [[255, 299, -1]]


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0, 3]], np.uint8), "has the class 3; the network has 3"),
        (np.zeros((2, 2, 3), np.uint8), "is no label map: its mode is RGB"),
        (np.zeros((2, 2, 4), np.uint8), "is no label map: its mode is RGBA"),
    ],
)
def test_label_maps_that_are_none(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match=message):
        read_label_map(tmp_path / "a.png", 3)


def test_a_damaged_label_map_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))
    with pytest.raises(BadInput, match=r"a\.png cannot be read as an image"):
        read_label_map(tmp_path / "a.png", 3)


def test_images_and_label_maps_go_in_pairs(engine, tmp_path):
    truths = {"a": scene(0), "b": scene(1)}
    data = write_truth(tmp_path / "data", truths, truths)
    assert [image.stem for image, _ in paired_files(data)] == ["a", "b"]
    (data / "labels" / "b.png").rename(tmp_path / "b.png")
    with pytest.raises(BadInput, match="there is no label map for 1 of 2 files: b"):
        evaluate(engine, data)
    (data / "images" / "b.png").unlink()
    (tmp_path / "b.png").rename(data / "labels" / "c.png")
    with pytest.raises(BadInput, match="there is no image for 1 of 2 files: c"):
        evaluate(engine, data)


def test_two_images_of_one_name_are_named(tmp_path):
    truths = {"a": scene(0)}
    data = write_truth(tmp_path / "data", truths, truths)
    Image.open(data / "images" / "a.png").save(data / "images" / "a.jpg")
    with pytest.raises(BadInput, match=r"a\.jpg and .*a\.png have one name"):
        paired_files(data)


def test_truth_that_does_not_fit(engine, tmp_path):
    data = write_truth(tmp_path / "data", {"a": scene(0)[:-1]}, {"a": scene(0)})
    with pytest.raises(BadInput, match=r"a\.png has \(48, 48\) pixels, its truth \(47, 48\)"):
        evaluate(engine, data)
    data = write_truth(tmp_path / "void", {"a": np.full((SIDE, SIDE), 255)}, {"a": scene(0)})
    with pytest.raises(BadInput, match=r"every pixel of the truth in .* is ignored"):
        evaluate(engine, data)
    with pytest.raises(BadRequest, match="--split is for COCO's panoptic layout"):
        evaluate(engine, data, "--split", "val")
    with pytest.raises(BadRequest, match="fast is an option of panoptic; colours does semantic"):
        evaluate(engine, data, "--fast")
    with pytest.raises(BadInput, match=r"DIR/labels/NAME\.png"):
        evaluate(engine, tmp_path / "nothing")


def test_the_report_has_the_figure(engine, tmp_path):
    truths, shown = ({"a": scene(seed)} for seed in (0, 50))
    body = evaluate(engine, write_truth(tmp_path / "data", truths, shown))
    (tmp_path / "result.json").write_text(json.dumps(body))
    (read,) = read_results([tmp_path / "result.json"]).evaluations
    assert (read.metric, read.value, read.images) == ("mIoU", body["value"], 1)
    page = tmp_path / "report.html"
    run("report", tmp_path / "result.json", "-o", page)
    assert f"{body['value']:.2f}" in page.read_text(encoding="utf-8")


# --- predict -------------------------------------------------------------------------------------------


def save_scene(path: Path, seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    Image.fromarray(COLOURS[scene(seed, size)]).save(path)
    return path


def test_shares_and_overlays(engine, tmp_path):
    photo = save_scene(tmp_path / "photo.png")
    shares = {LABELS[i]: np.mean(scene(0) == i) for i in range(3)}
    (line,) = run("predict", engine, photo).splitlines()
    named = sorted(shares, key=lambda name: -shares[name])
    assert line == f"{photo}: " + ", ".join(f"{name} {shares[name]:.0%}" for name in named)
    (row,) = json.loads(run("predict", engine, photo, "-o", tmp_path / "out", "--json"))
    assert {part["label"]: part["share"] for part in row["classes"]} == pytest.approx(shares)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo.png"]
    with Image.open(tmp_path / "out" / "photo.png") as picture:
        pixels = np.asarray(picture)
    # The picture is enlarged; a legend is below it.
    assert pixels.shape[1] == 320
    assert pixels.shape[0] > 320
    classes = np.kron(scene(0), np.ones((7, 7), int))[:320, :320]
    tints = [np.median(pixels[:320, :320][classes == i], axis=0) for i in range(3)]
    assert min(np.abs(a - b).max() for i, a in enumerate(tints) for b in tints[:i]) > 20


def test_a_picture_of_an_image_partly_seen(tmp_path):
    made = engine_of(tmp_path / "engine", image=ImageSpec((SIDE, SIDE), crop_pct=1.0))
    photo = save_scene(tmp_path / "photo.png", size=(SIDE, 3 * SIDE))
    run("predict", made, photo, "-o", tmp_path / "out")
    with Image.open(tmp_path / "out" / "photo.png") as picture, Image.open(photo) as original:
        plain = np.asarray(original.resize((320, round(320 / 3)), Image.Resampling.BILINEAR))
        left = np.asarray(picture.convert("RGB"))[: plain.shape[0], :100]
    assert np.array_equal(left, plain[:, :100])


def test_a_video_of_classes(engine, tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    clip = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*"MJPG"), 10, (240, 240))
    for seed in range(3):
        writer.write(
            np.ascontiguousarray(np.kron(COLOURS[scene(seed)], np.ones((5, 5, 1), np.uint8))[..., ::-1])
        )
    writer.release()
    rows = json.loads(run("predict", engine, clip, "-o", tmp_path / "out", "--json"))
    assert [row["frame"] for row in rows] == [0, 1, 2]
    assert {part["label"] for part in rows[0]["classes"]} == set(LABELS)
    assert (tmp_path / "out" / "clip.mp4").stat().st_size > 0


# --- raw tensors ---------------------------------------------------------------------------------------


def test_raw_tensors_are_printed_and_saved(tmp_path):
    made = engine_of(tmp_path / "engine", "tensors")
    photo = save_scene(tmp_path / "photo.png")
    (line,) = run("predict", made, photo, "-o", tmp_path / "out").splitlines()
    with np.load(tmp_path / "out" / "photo.npz") as saved:
        logits = saved["logits"]
    assert logits.shape == (3, SIDE, SIDE)
    assert np.array_equal(logits.argmax(0), scene(0))
    assert line == f"{photo}: logits float32 [3, {SIDE}, {SIDE}] {logits.min():g}..{logits.max():g}"
    (row,) = json.loads(run("predict", made, photo, "--json"))
    assert row["outputs"]["logits"]["shape"] == [3, SIDE, SIDE]
    assert np.array_equal(np.float32(row["outputs"]["logits"]["values"]), logits)


def test_raw_tensors_have_no_metric_and_no_video(tmp_path):
    made = engine_of(tmp_path / "engine", "tensors")
    with pytest.raises(BadRequest, match=r"no metric.*vitkit verify ARTIFACT --against RUN"):
        run("evaluate", made, "--data", tmp_path)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(BadRequest, match="colours does tensors, which takes images"):
        run("predict", made, tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["file", "allow_pickle", "head/scores:0"])
def test_an_output_of_any_name_is_saved(tmp_path, name):
    from vitkit.pictures.tensors import draw
    from vitkit.runtimes.tensors import Tensors

    draw(np.zeros((2, 2, 3), np.uint8), Tensors({name: np.arange(3)})).save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as saved:
        assert saved[name].tolist() == [0, 1, 2]


@pytest.mark.parametrize("task", ["semantic", "tensors"])
def test_inspect_and_verify(tmp_path, task):
    from vitkit.exporters.golden import write_golden

    made = engine_of(tmp_path / "engine", task)
    body = json.loads(run("inspect", made, "--json"))
    assert (body["task"], body["classes"]) == (task, 3 if task == "semantic" else 0)
    pixels = COLOURS[scene(0)][None]
    logits = (0.004 * pixels.astype(np.float32) @ COLOURS.T.astype(np.float32)).transpose(0, 3, 1, 2)
    logits -= 0.002 * (COLOURS.astype(np.float32) ** 2).sum(axis=1)[:, None, None]
    write_golden(made, pixels, {"logits": logits})
    assert "ok" in run("verify", made)
    write_golden(made, pixels, {"logits": logits[:, [1, 2, 0]]})
    result = CliRunner().invoke(app, ["verify", str(made), "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_another_tasks_network_is_refused(engine, tmp_path):
    from vitkit.evaluate import open_network
    from vitkit.evaluate.semantic import evaluate as measure

    network = open_network(engine_of(tmp_path / "engine", "tensors"))
    with pytest.raises(BadArtifact, match="does tensors; mIoU is for semantic segmentation"):
        measure(network, tmp_path)
