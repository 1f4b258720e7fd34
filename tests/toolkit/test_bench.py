import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.bench import (
    MIN_SAMPLES,
    BenchOptions,
    BenchReport,
    bench,
    compare,
    load,
    notes,
    save,
    to_markdown,
    to_tables,
)
from vitkit.bench import measure as module
from vitkit.bench.pool import make_pool
from vitkit.bench.ratios import _median_interval
from vitkit.runtimes.card import ImageSpec, ModelCard, TensorSpec, sha256, write_card
from vitkit.runtimes.errors import BadArtifact, BadInput, BadRequest, DeviceError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def write_artifact(folder: Path, batch: int | None = 1) -> Path:
    """Channel means of a uint8 [batch, 8, 8, 3] image as logits [batch, 3]."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["logits"], axes=[1, 2], keepdims=0),
    ]
    size = "n" if batch is None else batch
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, 8, 8, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [size, 3])],
    )
    folder.mkdir(parents=True)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
        folder / "model.onnx",
    )
    card = ModelCard(
        name="means",
        task="classification",
        target="onnx",
        precision="fp32",
        inputs=(TensorSpec("x", (batch, 8, 8, 3), "uint8"),),
        outputs=(TensorSpec("logits", (batch, 3), "float32"),),
        image=ImageSpec(size=(8, 8)),
        labels=("red", "green", "blue"),
        engine="model.onnx",
        files={"model.onnx": sha256(folder / "model.onnx")},
    )
    write_card(card, folder)
    return folder


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "WARMUP_S", 0.001)
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.setattr(module, "BLOCK_NS", 1_000_000)


@pytest.fixture
def artifact(tmp_path):
    return write_artifact(tmp_path / "means")


def report(times, rounds=None, **fields) -> BenchReport:
    cpu = {"model": "A", "cores": 2, "usable_cores": 2, "features": None, "governor": None}
    values = {
        "artifact": "a",
        "name": "means",
        "target": "onnx",
        "precision": "fp32",
        "files": {"model.onnx": "0"},
        "size_bytes": 1,
        "device": "cpu",
        "scope": "engine",
        "batch": 1,
        "threads": None,
        "load_ns": 1,
        "first_ns": 1,
        "warmup_runs": 10,
        "warmup_ns": 1,
        "times_ns": list(times),
        "rounds": list(rounds or [0] * len(times)),
        "stages_ns": {},
        "pool": {"source": "generated", "size": 1, "seed": 0},
        "protocol": {},
        "settings": {},
        "environment": {"cpu": cpu, "load_average_before": None, "load_average_after": [0.0, 0.5, 1.0]},
        "started": "now",
    }
    return BenchReport(**{**values, **fields})


# Percentiles


@given(st.lists(st.integers(1, 10**9), min_size=64, max_size=200))
def test_percentiles_are_nearest_rank(times):
    for q in (50.0, 90.0):
        expected = np.percentile(np.array(times), q, method="inverted_cdf")
        assert report(times).percentile(q) == expected


def test_the_rank_is_exact_where_binary_fractions_are_not():
    times = list(range(1, 10_001))
    for q in MIN_SAMPLES:
        assert report(times).percentile(q) == math.ceil(Fraction(str(q)) / 100 * 10_000)


def chance_of_at_most_one_over(n: int, q: float) -> float:
    under = Fraction(str(q)) / 100
    return float(under**n + n * (1 - under) * under ** (n - 1))


@pytest.mark.parametrize("q", [90.0, 95.0, 99.0, 99.9])
def test_sample_counts_give_99_percent_confidence(q):
    assert chance_of_at_most_one_over(MIN_SAMPLES[q], q) <= 0.01


@pytest.mark.parametrize("q", [90.0, 95.0, 99.0])
def test_sample_counts_are_the_smallest_that_do(q):
    assert chance_of_at_most_one_over(MIN_SAMPLES[q] - 1, q) > 0.01


@pytest.mark.parametrize("q", [90.0, 95.0, 99.0, 99.9])
def test_a_percentile_needs_its_samples(q):
    assert report([1] * (MIN_SAMPLES[q] - 1)).percentile(q) is None
    assert report([1] * MIN_SAMPLES[q]).percentile(q) == 1


def test_the_median_needs_one_sample():
    assert report([]).percentile(50) is None
    assert report([7]).percentile(50) == 7


def test_unknown_percentiles_are_refused():
    with pytest.raises(BadRequest, match="percentile 42 is not reported"):
        report([1]).percentile(42)


def test_outliers_are_not_clipped():
    times = [1] * 63 + [10**12]
    assert sum(report(times).to_json()["times_ns"]) == 63 + 10**12
    assert report(times).images_per_second == pytest.approx(64 / (63e-9 + 1e3))


def test_images_per_second_counts_the_batch():
    assert report([10**9, 3 * 10**9], batch=8).images_per_second == 4.0


# Comparison


def test_ratios_are_above_one_for_the_faster():
    rounds = list(range(9))
    reports = [report([20] * 9, rounds), report([10] * 9, rounds, artifact="b")]
    (ratio,) = compare(reports)
    assert (ratio.artifact, ratio.reference, ratio.ratio, ratio.rounds) == ("b", "a", 2.0, 9)
    assert (ratio.low, ratio.high) == (2.0, 2.0)


def test_rounds_are_paired():
    slow_moments = [1, 1, 1, 9, 9, 9, 9, 1]
    reference = report([20 * m for m in slow_moments], range(8))
    # Its own median falls into a slow moment, the reference's does not.
    other = report([10 * m for m in slow_moments] + [90] * 3, [*range(8), 3, 4, 5], artifact="b")
    (ratio,) = compare([reference, other])
    assert (ratio.low, ratio.ratio, ratio.high) == (2.0, 2.0, 2.0)


def test_ratios_are_per_image():
    (ratio,) = compare([report([10]), report([20], batch=4, artifact="b")])
    assert ratio.ratio == 2.0


def test_scopes_are_compared_apart():
    reports = [report([10]), report([40], scope="image"), report([5]), report([20], scope="image")]
    assert [(one.scope, one.ratio) for one in compare(reports)] == [("engine", 2.0), ("image", 2.0)]


@pytest.mark.parametrize("n", [6, 7, 20, 101])
def test_the_interval_is_the_narrowest_that_covers_95_percent(n):
    low, high = _median_interval([float(i) for i in range(1, n + 1)])

    def outside(rank):
        return 2 * sum(math.comb(n, i) for i in range(int(rank))) / 2**n

    assert low + high == n + 1
    assert outside(low) <= 0.05 < outside(low + 1)


def test_five_rounds_give_no_interval():
    assert _median_interval([1.0] * 5) == (None, None)
    assert _median_interval([]) == (None, None)


def test_separate_measurements_are_not_compared():
    reports = [report([10]), report([5], artifact="b", started="later")]
    with pytest.raises(BadRequest, match="vitkit bench a b"):
        compare(reports)
    assert "| - |" in to_markdown(reports)


# Scheduling


class Recorder:
    """Stands in for engines: queries of a fixed time, noted in the order they come."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(module.time, "sleep", lambda seconds: self.events.append(("pause", seconds)))

    def lane(self, name, wall_ns):
        def query():
            self.events.append(("query", name))
            return wall_ns, ()

        opened = SimpleNamespace(label=name, batch=1)
        return module._Lane(opened, "engine", query)

    def blocks(self):
        """(name, number of queries) after each pause."""
        starts = [i for i, event in enumerate(self.events) if event[0] == "pause"] + [len(self.events)]
        return [(self.events[a + 1][1], b - a - 1) for a, b in pairwise(starts)]


def measure(monkeypatch, times, duration, seed=0):
    recorder = Recorder(monkeypatch)
    lanes = [recorder.lane(name, wall) for name, wall in times.items()]
    for lane in lanes:
        module._warm_up(lane)
    recorder.events.clear()
    module._choose_blocks(lanes)
    module._measure(lanes, duration, np.random.default_rng(seed), lambda *_: None)
    return recorder, lanes


def test_every_round_measures_every_engine_once_in_drawn_order(monkeypatch):
    times = {"a": 10_000_000, "b": 20_000_000, "c": 5_000_000}
    recorder, _ = measure(monkeypatch, times, duration=1.0)
    names = [name for name, _ in recorder.blocks()]
    rounds = [tuple(names[i : i + 3]) for i in range(0, len(names), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    again, _ = measure(monkeypatch, times, duration=1.0)
    assert again.events == recorder.events


def test_a_pause_and_an_unrecorded_query_come_before_each_block(monkeypatch):
    recorder, lanes = measure(monkeypatch, {"a": 10_000_000, "b": 50_000_000}, duration=1.0)
    assert {event for event in recorder.events if event[0] == "pause"} == {("pause", module.PAUSE_S)}
    for lane in lanes:
        mine = [count for name, count in recorder.blocks() if name == lane.opened.label]
        assert set(mine) == {lane.block + 1}
        assert len(lane.times_ns) == sum(mine) - len(mine)


def test_blocks_take_equally_long_so_that_all_engines_share_all_rounds(monkeypatch):
    _, lanes = measure(monkeypatch, {"slow": 400_000_000, "fast": 1_000_000}, duration=10.0)
    slow, fast = lanes
    assert (slow.block, fast.block) == (5, 2000)
    assert set(slow.rounds) == set(fast.rounds) == set(range(5))
    assert slow.measured_ns == fast.measured_ns == 10**10


def test_warm_up_lasts_for_the_runs_and_the_time(monkeypatch):
    _, (slow, fast) = measure(monkeypatch, {"slow": 10**9, "fast": 10**6}, duration=0.1)
    assert len(slow.warmup_ns) == 10
    assert sum(fast.warmup_ns) == 10**9


def test_progress_ends_at_one(monkeypatch):
    recorder = Recorder(monkeypatch)
    seen = []
    module._measure(
        [recorder.lane("a", 3 * 10**8)], 4.0, np.random.default_rng(0), lambda text, done: seen.append(done)
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


class Clock:
    """A meter of 2 J a query, whoever asks."""

    def __init__(self, recorder):
        self.recorder = recorder

    def joules(self):
        return 2.0 * sum(event[0] == "query" for event in self.recorder.events)


def test_energy_is_that_of_the_recorded_queries(monkeypatch):
    recorder = Recorder(monkeypatch)
    lanes = [recorder.lane("a", 10_000_000), recorder.lane("b", 30_000_000)]
    for lane in lanes:
        lane.block = 5
    module._measure(lanes, 1.0, np.random.default_rng(0), lambda text, done: None, Clock(recorder))
    for lane in lanes:
        assert lane.joules == 2.0 * len(lane.times_ns)


def test_energy_of_an_image():
    energy = {"source": "RAPL", "joules": 12.0}
    assert report([1] * 3, batch=2, energy=energy).joules_per_image == 2.0
    assert report([1] * 3).joules_per_image is None


class FakeEngine:
    def __init__(self):
        self.card = SimpleNamespace(inputs=(TensorSpec("x", (None, 1), "uint8"),))
        self.seen = []

    def prepare(self, images):
        return np.array([[image[0, 0, 0]] for image in images])

    def run(self, feeds):
        self.seen.append(feeds["x"][:, 0].tolist())

    def run_batched(self, inputs):
        return {"y": inputs}

    def decode(self, outputs, photos):
        assert [photo[0, 0, 0] for photo in photos] == outputs["y"][:, 0].tolist()
        self.seen.append(outputs["y"][:, 0].tolist())


def test_every_engine_and_scope_meets_the_same_drawn_images():
    images = [np.full((1, 1, 3), i, np.uint8) for i in range(4)]
    engines = [FakeEngine() for _ in range(3)]
    lanes = [
        module._lane(module._Opened("", engine, 2, 0, 0), scope, images, 7)
        for engine, scope in zip(engines, ("engine", "engine", "image"), strict=True)
    ]
    for lane in lanes:
        for _ in range(20):
            lane.query()
    assert engines[0].seen == engines[1].seen == engines[2].seen
    assert all(len(drawn) == 2 for drawn in engines[0].seen)
    assert {i for drawn in engines[0].seen for i in drawn} == {0, 1, 2, 3}


# Pools


def test_generated_pools_repeat_by_seed_and_vary_in_size():
    one, same, other = (make_pool(BenchOptions(pool_size=8, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.images, same.images, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))
    assert len({image.shape for image in one.images}) > 1
    assert all(image.dtype == np.uint8 and image.std() > 30 for image in one.images)


def test_pools_of_real_images_skip_and_count_what_cannot_be_read(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (4 + i, 4)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    pool = make_pool(BenchOptions(images=tmp_path, pool_size=4))
    assert sorted(image.shape for image in pool.images) == [(4, 4, 3), (4, 5, 3), (4, 6, 3)]
    assert pool.description == {"source": str(tmp_path), "size": 3, "seed": 0, "unreadable": 1}
    assert len(make_pool(BenchOptions(images=tmp_path, pool_size=2)).images) == 2


@pytest.mark.parametrize("files", [[], ["broken.jpg"]])
def test_pools_without_a_readable_image_are_refused(tmp_path, files):
    for name in files:
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(BadInput, match=f"none of the {len(files)} images"):
        make_pool(BenchOptions(images=tmp_path, pool_size=4))


# The whole


@pytest.mark.usefixtures("quick")
def test_bench_measures_artifacts_side_by_side(artifact, tmp_path):
    other = write_artifact(tmp_path / "other")
    reports = bench([artifact, other], BenchOptions(duration=0.1, pool_size=4, seed=3))
    assert [(one.scope, one.artifact) for one in reports] == [
        ("engine", "means"),
        ("engine", "other"),
        ("image", "means"),
        ("image", "other"),
    ]
    for one in reports:
        assert sum(one.times_ns) >= 0.1e9
        assert len(one.rounds) == one.n
        assert one.rounds == sorted(one.rounds)
        assert set(one.rounds) == set(reports[0].rounds)
        assert one.warmup_runs >= 10
        assert min([*one.times_ns, one.load_ns, one.first_ns]) > 0
        assert one.files == {"model.onnx": sha256(artifact / "model.onnx")}
        assert one.size_bytes == (artifact / "model.onnx").stat().st_size
        assert one.pool == {"source": "generated", "size": 4, "seed": 3}
        assert one.settings["provider"] == "CPUExecutionProvider"
        assert {"cpu", "numpy", "vitkit", "command", "load_average_after"} <= set(one.environment)
    assert len(compare(reports)) == 2


@pytest.mark.usefixtures("quick")
def test_stage_times_add_up_to_the_wall_time(artifact):
    engine, image = bench([artifact], BenchOptions(duration=0.3, pool_size=4))
    assert engine.stages_ns == {}
    assert engine.stage_gap is None
    assert list(image.stages_ns) == ["prepare", "run", "decode"]
    assert all(len(times) == image.n for times in image.stages_ns.values())
    assert 0 <= image.stage_gap <= 0.02
    assert image.invalid is None
    assert list(image.stage_medians_ms) == ["prepare", "run", "decode"]


@pytest.mark.usefixtures("quick")
def test_batches(artifact, tmp_path):
    paths = [artifact, write_artifact(tmp_path / "four", 4), write_artifact(tmp_path / "any", None)]
    reports = bench(paths, BenchOptions(duration=0.02, pool_size=2, batch=3))
    assert [one.batch for one in reports] == [1, 4, 3] * 2


@pytest.mark.usefixtures("quick")
def test_real_images_and_threads(artifact, tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "photos/a.png")
    (one,) = bench(
        [artifact], BenchOptions(images=tmp_path / "photos", duration=0.01, threads=1, scopes=["image"])
    )
    assert one.pool["source"] == str(tmp_path / "photos")
    assert one.threads == one.settings["threads"] == 1


@pytest.mark.usefixtures("quick")
def test_reports_survive_json(artifact, tmp_path):
    reports = bench([artifact], BenchOptions(duration=0.02, pool_size=2))
    save(reports, tmp_path / "new/bench.json")
    assert load(tmp_path / "new/bench.json") == reports


def test_artifacts_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / "a/onnx", tmp_path / "b/onnx"]
    assert module.labels(paths) == [str(path) for path in paths]
    assert module.labels([tmp_path / "a/onnx", tmp_path / "b/openvino"]) == ["onnx", "openvino"]


# Refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"duration": 0}, "the duration is 0"),
        ({"duration": math.nan}, "the duration is nan"),
        ({"duration": math.inf}, "the duration is inf"),
        ({"batch": 0}, "the batch is 0"),
        ({"pool_size": 0}, "the pool size is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"scopes": ["engine", "app"]}, "known are engine, image"),
        ({"scopes": []}, "the scopes are none"),
        ({"scopes": "engine"}, "the scopes are 'engine'"),
        ({"scopes": ["engine", "engine"]}, "each once"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": "2"}, "threads is '2'"),
        ({"device": 0}, "the device is 0"),
        ({"batch": 2.0}, r"the batch is 2\.0"),
        ({"batch": True}, "the batch is True"),
        ({"pool_size": 10**9}, "the pool size is 1000000000"),
        ({"duration": "1"}, "the duration is '1'"),
        ({"duration": 10**7}, "the duration is 10000000"),
        ({"cool_down": -1.0}, r"the cool-down is -1\.0"),
        ({"images": 3}, "the images are 3"),
        ({"decode": 5}, "the decode options are 5"),
        ({"decode": {1: 2}}, "the decode options are {1: 2}"),
    ],
)
def test_options_out_of_range_are_refused(artifact, options, text):
    with pytest.raises(BadRequest, match=text):
        bench([artifact], BenchOptions(**options))


options = st.builds(
    BenchOptions,
    device=st.none() | st.sampled_from(["cpu", "gpu.1"]),
    threads=st.none() | st.integers(1, 64),
    batch=st.integers(1, 1000),
    duration=st.floats(0.01, 1e5),
    images=st.none() | st.just(Path("some images")),
    pool_size=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    scopes=st.sampled_from([("engine",), ("image", "engine")]),
    decode=st.none() | st.just({"top": 3}),
    max_isa=st.none() | st.just("avx2"),
)


@given(options)
def test_options_survive_the_way_to_a_device(one):
    assert BenchOptions.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_misspelt_option_is_refused_by_its_name():
    with pytest.raises(BadRequest, match=r"no option 'pool_sise'; known are device, .*pool_size"):
        BenchOptions.from_json({**BenchOptions().to_json(), "pool_sise": 3})
    with pytest.raises(BadRequest, match="the seed is '7'"):
        BenchOptions.from_json({**BenchOptions().to_json(), "seed": "7"})


def test_nothing_to_measure_is_refused():
    with pytest.raises(BadRequest, match="no artifact to measure"):
        bench([])


def test_an_absent_device_is_refused(artifact):
    with pytest.raises(DeviceError, match="no device 'npu'"):
        bench([artifact], BenchOptions(device="npu", pool_size=1))


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(BadArtifact, match=r"holds no card\.json"):
        bench([tmp_path], BenchOptions(pool_size=1))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "reports": [{}]}', '{"format": 2}'])
def test_other_files_are_not_taken_for_reports(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="bench"):
        load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("times_ns", []),
        ("times_ns", [5, "6"]),
        ("times_ns", [5, 0]),
        ("times_ns", [5, 10**16]),
        ("times_ns", [5, float("nan")]),
        ("times_ns", [5]),
        ("stages_ns", {"run": [1]}),
        ("stages_ns", {"run": 1}),
        ("rounds", [0, True]),
        ("batch", 0),
        ("threads", "two"),
        ("environment", []),
        ("artifact", None),
    ],
)
def test_reports_with_damaged_values_are_refused(tmp_path, field, value):
    path = tmp_path / "bench.json"
    good = report([5, 6], stages_ns={"run": [4, 5]}, scope="image").to_json()
    path.write_text(json.dumps({"format": 1, "reports": [good]}))
    assert load(path)[0].times_ns == [5, 6]
    path.write_text(json.dumps({"format": 1, "reports": [{**good, field: value}]}))
    with pytest.raises(BadInput, match=field if field != "times_ns" or value != [5] else "rounds"):
        load(path)


@pytest.mark.usefixtures("quick")
def test_the_decoding_is_recorded(artifact):
    (one,) = bench([artifact], BenchOptions(duration=0.01, pool_size=1, scopes=["image"], decode={"top": 2}))
    (plain,) = bench([artifact], BenchOptions(duration=0.01, pool_size=1, scopes=["image"]))
    assert (one.protocol["decode"], plain.protocol["decode"]) == ({"top": 2}, {})


def test_a_missing_file_of_reports(tmp_path):
    with pytest.raises(BadInput, match="is not a file of bench reports"):
        load(tmp_path / "bench.json")


# Rendering


def test_unsupported_percentiles_are_not_printed():
    few = to_markdown([report([1_500_000] * 64)])
    assert few.count("n too small") == 1
    assert to_markdown([report([1_500_000] * 63)]).count("n too small") == 2
    assert "| 1.50 | 1.50 | n too small |" in few


def test_markdown_is_one_table_even_for_odd_names():
    lines = to_markdown([report([1], artifact="a|b")]).splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1


def test_the_terminal_table_prints_names_as_they_are():
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(*to_tables([report([1], artifact="[red]model[/red]"), report([1], artifact="b")]))
    assert "[red]model[/red]" in console.export_text()


def test_invalid_measurements_say_so():
    stages = {"prepare": [30], "run": [60], "decode": [7]}
    good = report([100], scope="image", stages_ns={**stages, "decode": [9]})
    bad = replace(good, stages_ns=stages)
    assert good.invalid is None
    assert "3.0%" in bad.invalid
    assert notes([good, bad])[0].startswith("INVALID: a (image)")
    assert "INVALID" in to_markdown([bad])


def circumstances(**values):
    return {**report([1]).environment, **values}


def test_throttled_measurements_are_invalid():
    assert report([1], environment=circumstances(throttled=[])).invalid is None
    hot = report([1], environment=circumstances(throttled=["gpu-throttle-alert"]))
    assert "gpu-throttle-alert" in hot.invalid
    assert notes([hot])[0].startswith("INVALID: a (engine)")


def test_emulated_measurements_say_so_everywhere():
    settings = {"beyond_cap": {"MVN jit_avx512_f32": 25}}
    one = report([1], environment=circumstances(emulated_isa="avx2"), settings=settings)
    assert one.to_json()["summary"]["emulated"] == "avx2"
    assert "emulated avx2" in to_markdown([one])
    assert any(line.startswith("EMULATED") and "25 MVN jit_avx512_f32" in line for line in notes([one]))
    assert not any("EMULATED" in line for line in notes([report([1])]))


def test_busy_machines_are_told():
    busy = report([1], environment=circumstances(load_average_before=[1.5, 0.0, 0.0]))
    idle = report([1], environment=circumstances(load_average_before=[0.3, 4.0, 4.0]))
    assert any(line.startswith("NOISY") for line in notes([busy]))
    assert not any(line.startswith("NOISY") for line in notes([idle]))


def test_bench_needs_no_torch_and_no_vendor():
    code = (
        "import sys, vitkit.bench, vitkit.doctor; "
        "print([m for m in ('torch', 'onnxruntime', 'openvino', 'rich', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
