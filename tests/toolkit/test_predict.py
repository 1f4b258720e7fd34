"""`vitkit predict` and `vitkit evaluate`, panoptic: on a graph that knows scenes by their colours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from vitkit import BadInput, BadRequest, ImageSpec, MissingBackend, ModelCard, TensorSpec, open_engine
from vitkit.cli.main import app
from vitkit.cli.show import print_table, progress_bar, step_bar
from vitkit.data.coco import Category
from vitkit.data.coco.ids import describe_segments, read_ids
from vitkit.data.coco.read import read_predictions, read_split
from vitkit.data.coco.write import NewImage, write_panoptic_set
from vitkit.evaluate import open_network
from vitkit.evaluate.panoptic import card_categories, evaluate
from vitkit.runtimes.card import read_card, write_card
from vitkit.runtimes.errors import RunFailed

SIDE = 65
# A slot for each colour: two boxes, a ball, road, sky; black is void.
COLOURS = np.array(
    [(220, 30, 30), (250, 150, 30), (30, 60, 220), (110, 110, 110), (150, 210, 250), (0, 0, 0)], np.uint8
)
CLASSES = (0, 0, 1, 2, 3, 4)
LABELS = ("box", "ball", "road", "sky")
CATEGORIES = (
    Category(1, "box", True, (200, 0, 0)),
    Category(2, "ball", True, (0, 0, 200)),
    Category(21, "road", False, (90, 90, 90)),
    Category(30, "sky", False, (150, 200, 250)),
)
CATEGORY_OF = (1, 1, 2, 21, 30)
IMAGE = ImageSpec((SIDE, SIDE), fit="contain", interpolation="bilinear")
PHOTO = TensorSpec("image", (1, SIDE, SIDE, 3), "uint8")


def save_graph(folder, nodes, outputs, constants):
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, SIDE, SIDE, 3])]
    results = [helper.make_tensor_value_info(o.name, TensorProto.FLOAT, list(o.shape)) for o in outputs]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "colours", inputs, results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")


def save_card(folder, task, outputs, decode, ids=("1", "2", "21", "23"), labels=LABELS):
    card = ModelCard(
        "colours", task, "onnx", "fp32", (PHOTO,), tuple(outputs), IMAGE, labels, ids, decode=decode,
        engine="model.onnx", files={"model.onnx": None},
    )  # fmt: skip
    write_card(card, folder)


TO_NCHW = (
    helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
    helper.make_node("Transpose", ["float"], ["pixels"], perm=[0, 3, 1, 2]),
)


def colour_engine(folder: Path, ids=("1", "2", "21", "23")) -> Path:
    """An artifact whose masks say for every pixel which colour is the nearest."""
    slots, side = len(COLOURS), SIDE
    outputs = [
        TensorSpec("masks", (1, slots, side, side), "float32"),
        TensorSpec("classes", (1, slots, len(LABELS) + 1), "float32"),
    ]
    # Of -|x - c|^2 the part that the slots do not share.
    colours = COLOURS.astype(np.float32)
    classes = np.zeros((1, slots, len(LABELS) + 1), np.float32)
    classes[0, range(slots), CLASSES] = 12
    constants = {
        "weight": 0.002 * 2 * colours[:, :, None, None],
        "bias": -0.002 * (colours**2).sum(axis=1),
        "constant": classes,
    }
    nodes = [
        *TO_NCHW,
        helper.make_node("Conv", ["pixels", "weight", "bias"], ["masks"]),
        helper.make_node("Identity", ["constant"], ["classes"]),
    ]
    save_graph(folder, nodes, outputs, {name: np.asarray(v, np.float32) for name, v in constants.items()})
    save_card(folder, "panoptic", outputs, {"masks": "masks", "classes": "classes", "things": [0, 1]}, ids)
    return folder


def classifier(folder: Path) -> Path:
    """An artifact that tells whether a photograph is red, green or blue."""
    outputs = [TensorSpec("logits", (1, 3), "float32")]
    nodes = [
        *TO_NCHW,
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    save_graph(folder, nodes, outputs, {})
    save_card(folder, "classification", outputs, {"logits": "logits"}, None, ("red", "green", "blue"))
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return colour_engine(tmp_path_factory.mktemp("engines") / "colours")


def scene(seed=0, size=SIDE):
    """A photograph of flat colours, and the slot of every pixel: sky over road, two boxes, a ball, void."""
    rng = np.random.default_rng(seed)
    slots = np.full((size, size), 4)
    slots[size // 2 + int(rng.integers(-5, 5)) :] = 3
    slots[:3] = 5
    for slot, left in ((0, 2), (1, 24), (2, 46)):
        top, tall, wide = (int(rng.integers(*span)) for span in ((5, 40), (8, 20), (8, 16)))
        slots[top : top + tall, left : left + wide] = slot
    return COLOURS[slots], slots


def truth_ids(slots):
    return np.where(slots == 5, 0, slots + 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three scenes with their truth, in COCO's layout; sky has an id there that the card does not know."""

    def samples():
        for i in range(3):
            photo, slots = scene(i)
            ids = truth_ids(slots)
            segments = describe_segments(ids, {n + 1: category for n, category in enumerate(CATEGORY_OF)})
            yield NewImage(i + 1, f"{i + 1:012}.png", photo, ids, segments)

    return write_panoptic_set(tmp_path_factory.mktemp("data") / "scenes", CATEGORIES, {"val": samples()})


def run(*arguments):
    """Standard output of a command in this process; what it raises is raised here."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def save_scene(path: Path, seed=0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene(seed)[0]).save(path)
    return path


# --- predict -------------------------------------------------------------------------------------------


def test_a_line_for_each_image(engine, tmp_path):
    photo, void = save_scene(tmp_path / "a.png"), tmp_path / "void.png"
    Image.new("RGB", (30, 20)).save(void)
    lines = run("predict", engine, photo, void).splitlines()
    assert lines[0].startswith(f"{photo}: 2 box, 1 ball, ")
    assert set(lines[0].split(", ")[2:]) == {"road", "sky"}
    assert lines[1:] == [f"{void}: nothing found"]
    assert run("predict", engine, photo, "--fast").splitlines() == lines[:1]


def test_predictions_and_overlays(engine, tmp_path):
    photos = [save_scene(tmp_path / f"{name}.png", i) for i, name in enumerate(("a b", "000000000042"))]
    out = tmp_path / "out"
    rows = json.loads(run("predict", engine, *photos, "-o", out, "--json"))
    assert {path.name for path in out.iterdir()} == {
        "a b.png", "000000000042.png", "predictions.json", "predictions"
    }  # fmt: skip
    found = read_predictions(out / "predictions.json")
    assert set(found) == {"a b", 42}
    for i, (row, number) in enumerate(zip(rows, ("a b", 42), strict=True)):
        slots = scene(i)[1]
        assert row["image"] == str(photos[i])
        png, segments = found[number]
        ids = read_ids(png)
        for listed, saved in zip(row["segments"], segments, strict=True):
            (slot,) = np.unique(slots[ids == listed["id"]])
            assert ((ids == listed["id"]) == (slots == slot)).all()
            assert listed["label"] == LABELS[CLASSES[slot]]
            assert listed["thing"] == (slot < 3)
            assert listed["area"] == saved.area == (slots == slot).sum()
            assert 0.99 < listed["score"] == saved.score <= 1
            assert (saved.id, saved.category_id) == (listed["id"], (1, 1, 2, 21, 23)[slot])
            rows_, columns = np.nonzero(slots == slot)
            assert saved.box == (
                columns.min(), rows_.min(), np.ptp(columns) + 1, np.ptp(rows_) + 1
            )  # fmt: skip
        assert (ids == 0).sum() == (slots == 5).sum()
    body = json.loads((out / "predictions.json").read_text())
    kinds = [(c["id"], c["name"], c["isthing"]) for c in body["categories"]]
    assert kinds == [(1, "box", 1), (2, "ball", 1), (21, "road", 0), (23, "sky", 0)]
    with Image.open(out / "a b.png") as overlay:
        assert overlay.width == 320
        assert overlay.height > 320


def test_label_ids_that_are_no_numbers(tmp_path):
    for number, ids in enumerate((None, ("a", "2", "3", "4"), ("1", "1", "2", "3"), ("01", "2", "3", "4"))):
        card = read_card(colour_engine(tmp_path / str(number), ids))
        assert [category.id for category in card_categories(card)] == [1, 2, 3, 4]


def test_images_of_any_mode_and_size(engine, tmp_path):
    plain = Image.fromarray(scene()[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    tall = plain.crop((0, 0, SIDE, 30))
    pictures = {
        "grey": plain.convert("L"),
        "grey-alpha": plain.convert("LA"),
        "alpha": plain.convert("RGBA"),
        "palette": plain.convert("P"),
        "bits": plain.convert("1"),
        "one": plain.crop((0, 30, 1, 31)),
        "wide": plain.crop((0, 30, SIDE, 31)),
        "large": plain.resize((2000, 1500), Image.Resampling.NEAREST),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    tall.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    paths = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    rows = json.loads(run("predict", engine, *paths, "-o", out, "--json"))
    by_name = {Path(row["image"]).stem: row["segments"] for row in rows}
    alike = [[(s["label"], s["area"]) for s in by_name[name]] for name in ("alpha", "palette")]
    assert alike[0] == alike[1]
    assert len(alike[0]) == 5
    assert [s["label"] for s in by_name["one"]] == ["sky"]
    found = read_predictions(out / "predictions.json")
    sizes = {name: read_ids(png).shape for name, (png, _) in found.items()}
    assert sizes["turned"] == (SIDE, 30), "upright"
    assert sizes["one"] == (1, 1)
    assert sizes["wide"] == (1, SIDE)
    assert sizes["large"] == (1500, 2000)
    with Image.open(out / "turned.png") as overlay:
        assert overlay.height > overlay.width
    with Image.open(out / "large.png") as overlay:
        assert overlay.width == 1600


def test_images_of_one_name_are_kept_apart(engine, tmp_path):
    photos = [save_scene(tmp_path / name) for name in ("a.png", "b/a.png", "a-2.png")]
    run("predict", engine, *photos, "-o", tmp_path / "out")
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.png")) == ["a", "a-2", "a-2-2"]
    assert set(read_predictions(tmp_path / "out" / "predictions.json")) == {"a", "a-2", "a-2-2"}
    with pytest.raises(BadRequest, match="exists already"):
        run("predict", engine, *photos, "-o", tmp_path / "out")
    with pytest.raises(BadRequest, match="in the way"):
        run("predict", engine, photos[0], "-o", tmp_path)


def test_names_that_no_file_may_bear(engine, tmp_path):
    photos = [save_scene(tmp_path / f"{name}.png") for name in ("日" * 60, "a\tb", "#?%")]
    run("predict", engine, *photos, "-o", tmp_path / "out")
    assert set(read_predictions(tmp_path / "out" / "predictions.json")) == {"image 0", "image 1", "#?%"}
    assert (tmp_path / "out" / f"{'日' * 60}.png").is_file()


def test_bad_images_are_named_and_leave_no_predictions(engine, tmp_path):
    good, bad = save_scene(tmp_path / "good.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:200])
    thin = tmp_path / "thin.png"
    Image.new("RGB", (300, 1)).save(thin)
    for image in (bad, thin, tmp_path / "nowhere.png", tmp_path, tmp_path / ("x" * 300)):
        with pytest.raises(BadInput, match=image.name[:20]):
            run("predict", engine, good, image, "-o", tmp_path / "out")
        left = tmp_path / "out"
        assert not left.exists() or {path.name for path in left.iterdir()} <= {"good.png"}
    command = [sys.executable, "-c", "from vitkit.cli.main import main; main()"]
    done = subprocess.run([*command, "predict", engine, bad], capture_output=True, text=True)
    assert done.returncode == 2
    assert "bad.png" in done.stderr


def test_classification_is_as_it_was(tmp_path):
    made = classifier(tmp_path / "engine")
    blue = tmp_path / "blue.png"
    Image.new("RGB", (80, 40), (10, 20, 200)).save(blue)
    assert run("predict", made, blue) == f"{blue}: blue 100.0%, green 0.0%, red 0.0%\n"
    (row,) = json.loads(run("predict", made, blue, "--json", "-o", tmp_path / "out"))
    assert row["top"][0]["name"] == "blue"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["blue.png"]
    with pytest.raises(BadRequest, match="fast"):
        run("predict", made, blue, "--fast")
    shutil.copy(blue, tmp_path / "clip.mp4")
    with pytest.raises(BadRequest, match="video"):
        run("predict", made, tmp_path / "clip.mp4")
    with pytest.raises(BadRequest, match="panoptic"):
        run("evaluate", made, "--data", tmp_path, "--fast")


# --- folders and names ---------------------------------------------------------------------------------


def test_a_folder_is_all_its_images_in_order(engine, tmp_path):
    photos = [save_scene(tmp_path / "in" / name, i) for i, name in enumerate(("b.png", "a/c.png", "a/a.jpg"))]
    single = save_scene(tmp_path / "z.png", 3)
    (tmp_path / "in" / ".hidden.png").write_bytes(b"no image")
    lines = run("predict", engine, single, tmp_path / "in").splitlines()
    expected = [single, *sorted(photos)]
    assert [line.split(": ")[0] for line in lines] == [str(path) for path in expected]
    alone = [run("predict", engine, path).strip() for path in expected]
    assert lines == alone
    rows = json.loads(run("predict", engine, tmp_path / "in", single, "--json"))
    assert [row["image"] for row in rows] == [str(path) for path in (*sorted(photos), single)]


@pytest.mark.parametrize("make", [colour_engine, classifier])
def test_pictures_within_the_folder_are_no_input_of_the_next_run(make, tmp_path):
    made = make(tmp_path / "engine")
    photos = [save_scene(tmp_path / "in" / name) for name in ("a.png", "b.png")]
    out = tmp_path / "in" / "out"
    first = run("predict", made, tmp_path / "in", "-o", out).splitlines()
    assert [line.split(": ")[0] for line in first] == [str(path) for path in photos]
    (out / "predictions.json").unlink(missing_ok=True)
    shutil.rmtree(out / "predictions", ignore_errors=True)
    assert run("predict", made, tmp_path / "in", "-o", out).splitlines() == first


def test_a_folder_without_images_is_named(engine, tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    with pytest.raises(BadInput, match=r"deep holds no images"):
        run("predict", engine, tmp_path / "deep")


def test_one_unreadable_image_of_a_folder_is_named(engine, data, tmp_path):
    for i in range(4):
        save_scene(tmp_path / "in" / f"{i}.png", i)
    (tmp_path / "in" / "2.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match=r"in.2\.png"):
        run("predict", engine, tmp_path / "in", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "predictions.json").exists()


def command(*arguments, columns="200"):
    """The command in a process of its own: exit code, standard output and standard error, as bytes."""
    start = [sys.executable, "-c", "from vitkit.cli.main import main; main()"]
    environment = {**os.environ, "COLUMNS": columns}
    done = subprocess.run([*start, *arguments], capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_name_that_is_not_utf_8(tmp_path):
    made = classifier(tmp_path / "engine")
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    name = os.path.join(folder, b"caf\xe9.png")
    try:
        with open(name, "wb") as file:
            Image.new("RGB", (80, 40), (10, 20, 200)).save(file, "PNG")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    code, out, _ = command("predict", made, folder)
    assert (code, out) == (0, folder + b"/caf\\udce9.png: blue 100.0%, green 0.0%, red 0.0%\n")
    code, out, _ = command("predict", made, folder, "--json", "-o", tmp_path / "out")
    (row,) = json.loads(out)
    assert os.fsencode(row["image"]) == name
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"caf\xe9.png"]
    data = tmp_path / "data"
    (data / "blue").mkdir(parents=True)
    shutil.copy(name, os.path.join(os.fsencode(data), b"blue", b"\xff.png"))
    assert command("evaluate", made, "--data", data)[1].endswith(
        b"top-1 100.00 %, top-5 100.00 % of 1 images\n"
    )
    os.rename(data / "blue", os.path.join(os.fsencode(data), b"bl\xfce"))
    code, _, error = command("evaluate", made, "--data", data)
    assert code == 2
    assert b"bl\\udcfce" in error
    assert b"red, green, blue" in error


def test_names_that_look_like_markup_are_shown_as_they_are(data, tmp_path):
    """Square brackets, a stray closing tag and an emoji's name in folders, cards and class names."""
    odd = "[bold]x[/red] :smile: [/]"
    made = colour_engine(tmp_path / odd.replace("/", "|"))
    body = json.loads((made / "card.json").read_text())
    (made / "card.json").write_text(json.dumps({**body, "name": odd}))
    assert f"{odd}, onnx fp32: 3 images" in run("evaluate", made, "--data", data).splitlines()[0]
    saved = tmp_path / "[b]p[|b].json"
    run("evaluate", made, "--data", data, "--save", saved)
    text = run("evaluate", "--predictions", saved, "--data", data)
    assert "[b]p[|b].json: 3 images" in "".join(text.splitlines()[:3])
    assert odd in run("inspect", made)
    labels = ["[red]box[/red]", "[/]", "ro[b]ad", ":sky:"]
    (made / "card.json").write_text(json.dumps({**body, "labels": labels}))
    line = run("predict", made, save_scene(tmp_path / "[i]" / "a.png"))
    assert line.startswith(f"{tmp_path}/[i]/a.png: 2 [red]box[/red], 1 [/], ")


def test_tables_and_bars_take_no_markup(capsys):
    print_table(("[b]", "n"), [("[/nothing] :smile:", 1), (None, 2)], title="[red]t[/red]")
    shown = capsys.readouterr().out
    assert "[b]" in shown
    assert "[/nothing] :smile:" in shown
    assert "[red]t[/red]" in shown
    with progress_bar("[/nothing]") as progress:
        progress(1, 2)
    with step_bar() as step:
        step("[/nothing]", 0.5)


# --- videos --------------------------------------------------------------------------------------------


def test_every_is_for_videos(engine, tmp_path):
    photo = save_scene(tmp_path / "a.png")
    with pytest.raises(BadRequest, match="at least 1"):
        run("predict", engine, photo, "--every", 0)
    with pytest.raises(BadRequest, match="videos"):
        run("predict", engine, photo, "--every", 2)


def test_without_opencv_the_remedy_is_named(engine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "a.MP4").write_bytes(b"")
    with pytest.raises(MissingBackend, match=r"opencv-python-headless.*pip install 'vitkit\[video\]'"):
        run("predict", engine, tmp_path / "a.MP4")


def test_opencv_is_imported_in_one_file():
    root = Path(__file__).resolve().parents[2]
    files = [
        path
        for room in ("runtimes", "calibration", "exporters", "toolkit")
        for path in (root / room).rglob("*.py")
    ]
    assert [path.name for path in files if "import cv2" in path.read_text(encoding="utf-8")] == ["video.py"]


@pytest.fixture
def clip(tmp_path) -> Path:
    """Twelve frames of 260 x 260, ten a second; the ball goes to the right."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install opencv-python-headless")
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (260, 260))
    assert writer.isOpened()
    for i in range(12):
        slots = np.full((260, 260), 4)
        slots[100:160, 10 + 10 * i : 70 + 10 * i] = 2
        writer.write(np.ascontiguousarray(COLOURS[slots][..., ::-1]))
    writer.release()
    return path


def test_a_video(engine, clip, tmp_path):
    import cv2

    lines = run("predict", engine, clip, "--every", 5).splitlines()
    assert lines == [f"{clip} frame {i}: 1 ball, sky" for i in (0, 5, 10)]
    out = tmp_path / "out"
    photo = save_scene(tmp_path / "photo.png")
    rows = json.loads(run("predict", engine, clip, photo, "-o", out, "--json", "--every", 2))
    assert [row.get("frame") for row in rows] == [0, 2, 4, 6, 8, 10, None]
    found = read_predictions(out / "predictions.json")
    assert set(found) == {*(f"clip_{i:06}" for i in range(0, 12, 2)), "photo"}
    for i in range(0, 12, 2):
        png, segments = found[f"clip_{i:06}"]
        (ball,) = (s for s in segments if s.category_id == 2)
        expected = np.zeros((260, 260), bool)
        expected[100:160, 10 + 10 * i : 70 + 10 * i] = True
        mask = read_ids(png) == ball.id
        assert (mask & expected).sum() / (mask | expected).sum() > 0.9
    assert {path.name for path in out.iterdir()} == {
        "clip.mp4", "photo.png", "predictions.json", "predictions"
    }  # fmt: skip
    capture = cv2.VideoCapture(str(out / "clip.mp4"))
    assert abs(capture.get(cv2.CAP_PROP_FPS) - 5) < 0.1
    frames = 0
    while capture.grab():
        frames += 1
    assert frames == 6


def test_videos_that_are_none(engine, clip, tmp_path):
    bad = tmp_path / "bad.mp4"
    for content in (b"", b"no video at all", clip.read_bytes()[:300]):
        bad.write_bytes(content)
        with pytest.raises(BadInput, match=r"bad\.mp4"):
            run("predict", engine, bad, "-o", tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


def test_no_encoder(engine, clip, tmp_path, monkeypatch):
    import cv2

    class Writer:
        def __init__(self, *arguments):
            pass

        def isOpened(self):
            return False

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoWriter", Writer)
    with pytest.raises(BadRequest, match="no encoder"):
        run("predict", engine, clip, "-o", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# --- evaluate ------------------------------------------------------------------------------------------


def test_a_network_that_is_always_right(engine, data, tmp_path):
    saved = tmp_path / "saved.json"
    body = json.loads(run("evaluate", engine, "--data", data, "--json", "--save", saved))
    assert (body["images"], body["miou"], body["target"], body["fast"]) == (3, 100.0, "onnx", False)
    assert body["all"] == {"pq": 100.0, "sq": 100.0, "rq": 100.0, "categories": 4}
    assert body["things"]["categories"] == body["stuff"]["categories"] == 2
    assert body["classes"]["box"]["tp"] == 6
    again = json.loads(run("evaluate", "--predictions", saved, "--data", data, "--split", "val", "--json"))
    assert again["predictions"] == str(saved)
    assert {key: again[key] for key in ("all", "things", "stuff", "miou", "classes")} == {
        key: body[key] for key in ("all", "things", "stuff", "miou", "classes")
    }
    assert {c["id"] for c in json.loads(saved.read_text())["categories"]} == {1, 2, 21, 30}
    assert all(segment.box[2] for _, segments in read_predictions(saved).values() for segment in segments)
    with pytest.raises(BadRequest, match="exists already"):
        run("evaluate", engine, "--data", data, "--save", saved)


def test_the_table(engine, data):
    text = run("evaluate", engine, "--data", data, "--fast")
    assert "colours, onnx fp32 (fast): 3 images" in text
    for name, count in (("all", 4), ("things", 2), ("stuff", 2)):
        (line,) = (line for line in text.splitlines() if f" {name} " in line)
        assert line.split() == ["│", name, "│", "100.00", "│", "100.00", "│", "100.00", "│", str(count), "│"]
    assert text.splitlines()[-1] == "mIoU 100.00 %"


def test_predict_gives_what_evaluate_scores(engine, data, tmp_path):
    """COCO's file names carry its image ids, so that predictions of plain photographs can be scored."""
    kinder = shutil.copytree(data, tmp_path / "data")
    source = kinder / "annotations" / "panoptic_val.json"
    source.write_text(source.read_text().replace('"id": 30', '"id": 23').replace('_id": 30', '_id": 23'))
    run("predict", engine, *sorted((data / "val").iterdir()), "-o", tmp_path / "out")
    body = json.loads(
        run("evaluate", "--predictions", tmp_path / "out" / "predictions.json", "--data", kinder, "--json")
    )
    assert body["all"]["pq"] == 100.0


def test_every_result_is_heard(engine, data):
    heard, steps = [], []
    network = open_network(engine)
    report = evaluate(
        network,
        read_split(data),
        progress=lambda done, total: steps.append((done, total)),
        keep=lambda image, result, segments: heard.append((image.image_id, len(segments))),
    )
    network.close()
    assert report.all.pq == 100.0
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert [number for number, _ in heard] == [1, 2, 3]


def test_outputs_that_are_no_numbers_are_the_engines_fault(engine, data):
    with closing(open_network(engine)) as network:

        def predict(inputs):
            outputs = network.predict(inputs)
            outputs["masks"][0, 0, 1, 2] = np.nan
            return outputs

        with pytest.raises(RunFailed, match=r"colours \(onnx fp32\).*'masks'.*000000000001\.png"):
            evaluate(network._replace(predict=predict), data)


def test_one_of_network_and_predictions(engine, data, tmp_path):
    for arguments in ((), (engine, "--predictions", tmp_path / "p.json")):
        with pytest.raises(BadRequest, match="either"):
            run("evaluate", *arguments, "--data", data)
    for flag in (["--fast"], ["--save", tmp_path / "s.json"], ["--threads", 1]):
        with pytest.raises(BadRequest, match="for networks"):
            run("evaluate", "--predictions", tmp_path / "p.json", "--data", data, *flag)
    with pytest.raises(BadInput, match=r"p\.json"):
        run("evaluate", "--predictions", tmp_path / "p.json", "--data", data)
    with pytest.raises(BadInput, match="has no split"):
        run("evaluate", engine, "--data", data, "--split", "test")
    with pytest.raises(BadRequest, match=r"must be named \*\.json"):
        run("evaluate", engine, "--data", data, "--save", tmp_path / "s")


def test_a_failure_leaves_nothing(engine, data, tmp_path):
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / "val" / "000000000003.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="000000000003"):
        run("evaluate", engine, "--data", broken, "--save", tmp_path / "saved" / "s.json")
    assert not list((tmp_path / "saved").iterdir())


def test_the_engine_answers_the_same(engine):
    photo, slots = scene(5)
    with open_engine(engine) as opened:
        result = opened(photo)
    assert (result.ids == 0).sum() == (slots == 5).sum()
    assert {s.label for s in result.segments} == set(LABELS)
