"""The page of `vitkit report`: what it joins, shows, escapes and refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_bench import report
from test_cli import vitkit

from vitkit.bench import save
from vitkit.evaluate.accuracy import Accuracy
from vitkit.evaluate.panoptic_quality import Quality, QualityReport
from vitkit.evaluate.results import to_json
from vitkit.report import write_report
from vitkit.report.page import page
from vitkit.report.plots import Point, Strip, front, strips
from vitkit.report.results import Evaluation, Results, read_results
from vitkit.report.text import shown, significant
from vitkit.runtimes.card import ImageSpec, ModelCard
from vitkit.runtimes.errors import BadInput, BadRequest

pytest.importorskip("matplotlib")

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "' onmouseover='window.hacked = 1",
    "</title></svg></style><script>window.hacked = 1</script>",
    "&lt;b&gt; $\\frac{1}{2}$ \\N{BULLET} %s {0} #fe00f0 #fe0099",
    "\ud800 \u202egnp.exe \x00\x1b[31m\n",
    "模型 модель 🚀",
    "x" * 10_000,
)


def evaluation(artifact="a", **changes) -> dict:
    body = {
        "format": 1,
        "network": artifact,
        "artifact": artifact,
        "name": "means",
        "target": "onnx",
        "precision": "fp32",
        "files": {"model.onnx": "0"},
        "size_bytes": 1,
        "data": "photos/val",
        "images": 200,
        "top1": 75.0,
        "top5": 90.0,
    }
    return {**body, **changes}


@pytest.fixture
def write(tmp_path):
    """Writes reports, dictionaries or text to a file of the given name."""

    def write(name, content) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            save(content, path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


class Page(HTMLParser):
    """Tags with their attributes, and the cells of every table by its label."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "div" and "aria-label" in dict(attributes):
            self._rows = self.tables.setdefault(dict(attributes)["aria-label"], [])
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self._rows[-1][-1] += data


def column(text: str, table: str, title: str) -> list[str]:
    header, *rows = Page(text).tables[table]
    return [row[header.index(title)] for row in rows]


def made(*paths) -> str:
    return page(read_results(paths))


# Joining


def test_accuracy_is_joined_by_the_hashes_of_the_files(write):
    reports = [report([5_000_000] * 9), report([7_000_000] * 9, artifact="b", files={"model.onnx": "1"})]
    bench = write("bench.json", reports)
    one = write("one.json", evaluation(top1=75.0))
    # The same weights under another name of the folder are the same artifact.
    other = write("other.json", evaluation("copy-of-b", files={"model.onnx": "1"}, top1=50.0))
    text = made(bench, one, other)
    cells = column(text, "Latency, scope engine", "top-1 % (photos/val, n 200)")
    assert [cell.split(" ")[0] for cell in cells] == ["75.00", "50.00"]


def test_accuracy_of_other_files_is_not_joined(write):
    text = made(
        write("bench.json", [report([5])]), write("acc.json", evaluation("b", files={"model.onnx": "9"}))
    )
    assert not any("top-1" in cell for cell in Page(text).tables["Latency, scope engine"][0])
    assert column(text, "Artifacts", "artifact") == ["a", "b"]


def test_one_artifact_with_two_hashes_is_refused(write):
    bench = write("bench.json", [report([5])])
    anew = write("acc.json", evaluation(files={"model.onnx": "1234567890abcdef"}))
    with pytest.raises(BadInput, match=r"bench\.json and .*acc\.json .* 0 in the first and 1234567890ab in"):
        made(bench, anew)


def test_results_that_disagree_are_refused_and_equal_ones_count_once(write):
    bench = write("bench.json", [report([5], started="2026-01-02")])
    again = write("again.json", [report([5], started="2026-01-02")])
    one, same = write("one.json", evaluation()), write("same.json", evaluation())
    assert made(bench, again, one, same) == made(bench, one)
    with pytest.raises(BadInput, match=r"gives a top-1 80\.00 % on photos/val, another result 75\.00"):
        made(bench, one, write("two.json", evaluation(top1=80.0)))


def test_data_sets_have_columns_of_their_own(write):
    paths = [write(f"{i}.json", evaluation(data=f"{i}/val", top1=70.0 + i)) for i in range(2)]
    header = Page(made(write("bench.json", [report([5])]), *paths)).tables["Artifacts"][0]
    assert [title for title in header if "top-1" in title] == [f"top-1 % ({i}/val, n 200)" for i in range(2)]


def test_what_evaluate_writes_is_read(tmp_path, write):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model.onnx").write_bytes(b"weights")
    card = ModelCard(
        "means",
        "classification",
        "onnx",
        "fp32",
        (),
        (),
        ImageSpec((8, 8)),
        engine="model.onnx",
        files={"model.onnx": None},
    )
    quality = QualityReport(
        7,
        Quality(40.0, 80.0, 50.0, 3),
        Quality(0, 0, 0, 0),
        Quality(0, 0, 0, 0),
        33.0,
        {},
        data="coco.json",
        settings={"fast": True},
    )
    top1 = write("top1.json", to_json(tmp_path / "net", card, Accuracy("val", 4, 75.0, 100.0, (1, 2, 3, 4))))
    pq = write("pq.json", to_json(tmp_path / "net", card, quality))
    one, two = read_results([top1, pq]).evaluations
    assert one.files == two.files == {"model.onnx": hashlib.sha256(b"weights").hexdigest()}
    assert (one.metric, one.value, one.images, one.size_bytes) == ("top-1", 75.0, 4, 7)
    assert (two.metric, two.value, two.images, two.fast, two.low) == ("PQ", 40.0, 7, True, None)


@given(st.integers(1, 5000), st.data())
def test_the_interval_solves_the_score_equation(n, data):
    """Wilson's bounds are the shares p at which the seen share is 1.96 standard errors of p away."""
    from vitkit.report.results import _wilson

    share = data.draw(st.integers(0, n)) / n
    for bound in (edge / 100 for edge in _wilson(share, n)):
        if 1e-9 < bound < 1 - 1e-9:
            error = math.sqrt(bound * (1 - bound) / n)
            assert abs(share - bound) == pytest.approx(1.959964 * error, rel=1e-6)


# Plots


points = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_holds_exactly_what_nothing_beats(places):
    given = [Point("", 0, x, y, None, None) for x, y in places]
    unbeaten = {
        (p.x, p.y)
        for p in given
        if not any(q.x <= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in given)
    }
    assert {(p.x, p.y) for p in front(given)} == unbeaten


def test_every_query_has_its_dot():
    times = [10.0, 11.0, 12.5, 12.5, 29.0, 10.2]
    svg = strips([Strip("a", 0, times, {"p50": 11.0})], "strip", "ms")
    (dots,) = re.findall(r'd="((?:M\S+ \S+?h0)+)" style="fill: none; stroke: var\(--series-0', svg)
    drawn = [tuple(map(float, one)) for one in re.findall(r"M(\S+) (\S+?)h0", dots)]
    assert len(drawn) == len(times)
    # The axis spans the times and 2 % more, from 16 to 384; rows run down over 24 units.
    low, high = 10 - 0.02 * 19, 29 + 0.02 * 19
    expected = [16 + 368 * (time - low) / (high - low) for time in times]
    in_order = [x for x, _ in sorted(drawn, key=lambda dot: dot[1])]
    assert in_order == pytest.approx(expected, abs=0.3)


def test_a_page_of_very_many_queries_stays_small(write):
    times = [5_000_000 + (i * 7919) % 1_000_000 for i in range(30_000)]
    assert len(made(write("bench.json", [report(times)]))) < 400_000


# What the page says


def test_percentiles_need_their_samples(write):
    reports = [report([5_000_000] * 63), report([6_000_000] * 64, artifact="b", files={"model.onnx": "1"})]
    text = made(write("bench.json", reports))
    assert column(text, "Latency, scope engine", "p90 ms") == ["n too small", "6.00"]
    assert column(text, "Latency, scope engine", "p99 ms") == ["n too small"] * 2
    assert "p90 6.00" in text
    assert "p90 5.00" not in text


def test_speed_is_told_within_one_call_only(write):
    first = [
        report([6_000_000], started="1"),
        report([3_000_000], started="1", artifact="b", files={"m": "1"}),
    ]
    apart = [report([2_000_000], started="2", artifact="c", files={"m": "2"})]
    text = made(write("one.json", first), write("two.json", apart))
    assert column(text, "Latency, scope engine", "times as fast") == ["–", "2.00 (n too small)", "–"]
    assert "separate bench calls" in text


def test_energy_has_a_column_only_where_it_was_measured():
    plain = report([5] * 4)
    measured = replace(plain, batch=2, started="later", energy={"joules": 2.0, "source": "RAPL"})
    assert "J an image" not in page(Results([plain], []))
    text = page(Results([plain, measured], []))
    assert column(text, "Latency, scope engine", "J an image") == ["–", "0.250 estimate: RAPL"]
    assert "not from a meter at the wall" in text


def test_emulated_rows_are_marked():
    plain = report([5])
    held = report([6], environment={**plain.environment, "emulated_isa": "avx2"}, started="later")
    text = page(Results([plain, held], []))
    assert column(text, "Latency, scope engine", "artifact") == ["a", "a emulated avx2"]
    assert "lesser instruction set" in text
    assert "lesser instruction set" not in page(Results([plain], []))


def test_invalid_measurements_are_named_and_plotted_against_no_accuracy(write):
    bad = report([100], scope="image", stages_ns={"prepare": [30], "run": [60], "decode": [1]})
    good = report(
        [100],
        scope="image",
        stages_ns={"prepare": [30], "run": [60], "decode": [9]},
        artifact="b",
        files={"model.onnx": "1"},
    )
    accuracies = [
        write("a.json", evaluation()),
        write("b.json", evaluation("b", files={"model.onnx": "1"})),
    ]
    assert "top-1 against latency" not in made(write("bench.json", [bad, good]), *accuracies)
    text = made(write("bench.json", [bad, good]))
    assert "<b>Invalid:</b> a (scope image): its stages leave 9.0% of the wall time" in text
    assert "a invalid" in column(text, "Latency, scope image", "artifact")


def test_accuracy_in_the_fast_mode_belongs_to_latency_in_the_fast_mode(write):
    def bench(i, fast):
        return report(
            [5 + i],
            scope="image",
            stages_ns={"run": [5 + i]},
            artifact=str(i),
            files={"m": str(i)},
            protocol={"decode": {"fast": fast}},
        )

    accuracies = [write(f"{i}.json", evaluation(str(i), files={"m": str(i)}, fast=True)) for i in range(2)]
    exact = made(write("exact.json", [bench(i, False) for i in range(2)]), *accuracies)
    fast = made(write("fast.json", [bench(i, True) for i in range(2)]), *accuracies)
    assert "top-1 against latency" not in exact
    assert "top-1 against latency" in fast


def test_several_models_are_told_apart_in_the_plots(write):
    other = report([6], name="wide", files={"model.onnx": "1"})
    assert ">means/a<" not in made(write("one.json", [report([5])]))
    text = made(write("two.json", [report([5]), other]))
    assert ">means/a<" in text
    assert ">wide/a<" in text


def test_numbers_have_three_significant_digits():
    numbers = (0.01234, 4.567, 78.94, 123.4, 12345.6, 0)
    assert [significant(n) for n in numbers] == ["0.0123", "4.57", "78.9", "123", "12346", "0"]


def test_the_same_results_give_the_same_bytes(write, tmp_path):
    paths = [write("bench.json", [report([5, 6, 7])]), write("acc.json", evaluation())]
    first = write_report(paths, tmp_path / "1.html").read_bytes()
    assert write_report(paths, tmp_path / "2.html").read_bytes() == first


# Self-contained, whatever the names hold


def hostile_results() -> Results:
    reports, evaluations = [], []
    for i, name in enumerate(HOSTILE):
        files = {name: str(i)}
        environment = {"cpu": {"model": name, name: [name, {name: name}]}, name: name}
        reports += [
            report(
                [5_000_000 + i, 6_000_000],
                artifact=name,
                name=name,
                target=name,
                precision=name,
                device=name,
                files=files,
                scope=scope,
                settings={name: name},
                environment=environment,
                pool={"source": name},
                started=f"{i} {name}",
            )
            for scope in ("engine", name)
        ]
        evaluations.append(
            Evaluation(name, name, name, name, files, 1, "top-1", 50.0 + i, 40.0, 70.0, 9, HOSTILE[0], False)
        )
    return Results(reports, evaluations)


def test_hostile_names_stay_text():
    text = page(hostile_results())
    text.encode("utf-8")
    tags = Page(text).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not {"img", "iframe", "object", "a", "link", "base", "form"} & {tag for tag, _ in tags}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert HOSTILE[0] in column(text, "Artifacts", "artifact")
    assert "x" * 1001 not in text
    assert "\u202e" not in text
    assert "\x00" not in text


@given(st.text(st.characters(codec=None), max_size=300))
def test_shown_text_can_be_written_and_is_short(text):
    assert len(shown(text).encode("utf-8").decode()) <= 120
    assert shown(text).isprintable()


def test_the_page_asks_the_network_for_nothing(write):
    text = made(write("bench.json", [report([5, 6])]), write("acc.json", evaluation()))
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"\w+://[^\s\"'<>]+", text)) <= names
    assert not [tag for tag, attributes in Page(text).tags if {"src", "srcset"} & set(attributes)]


def test_only_the_pages_own_script_may_run(write):
    text = made(write("bench.json", [report([5])]))
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (
        attributes["content"]
        for tag, attributes in Page(text).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


# Refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds something else"),
        ("{}", "holds something else"),
        ({"ok": True, "artifact": "a", "checks": []}, "holds something else"),
        ({"predictions": "p.json", "all": {"pq": 1}}, "holds accuracy of predictions"),
        ({"format": 1, "reports": []}, "holds no results; measure with: vitkit bench"),
        ({"format": 1, "reports": 7}, "is not a file of bench reports"),
        ({"format": 2, "reports": [{}]}, "has report format 2"),
        ({"network": "engine", "images": 3, "top1": 1.0}, "vitkit evaluate engine --data DATA --json > "),
        (evaluation(format=9), "has format 9; this vitkit reads 1"),
        (evaluation(top1=101.0), "top-1 cannot be used"),
        (evaluation(top1=float("nan")), "top-1 cannot be used"),
        (evaluation(top1="75"), "top-1 cannot be used"),
        (evaluation(images=0), "'images' cannot be used"),
        (evaluation(files={}), "'files' cannot be used"),
        (evaluation(files={"m": 3}), "'files' cannot be used"),
        (evaluation(name=3), "the texts cannot be used"),
        ({key: value for key, value in evaluation().items() if key != "data"}, "damaged.*'data'"),
    ],
)
def test_bad_results_are_refused_and_nothing_is_written(write, tmp_path, content, message):
    good = write("good.json", [report([5])])
    with pytest.raises(BadInput, match=message):
        write_report([good, write("bad.json", content)], tmp_path / "report.html")
    assert {path.name for path in tmp_path.iterdir()} == {"good.json", "bad.json"}


def test_bad_requests_are_refused(write, tmp_path):
    good = write("good.json", [report([5])])
    before = good.read_bytes()
    with pytest.raises(BadInput, match=r"nowhere\.json cannot be read"):
        write_report([tmp_path / "nowhere.json"], tmp_path / "report.html")
    with pytest.raises(BadRequest, match="no results"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(BadRequest, match="is also one of the results"):
        write_report([good], tmp_path / "." / "good.json")
    with pytest.raises(BadRequest, match="is a folder"):
        write_report([good], tmp_path)
    with pytest.raises(BadInput, match="have no round in common"):
        made(write("odd.json", [report([5], [0]), report([5], [1], artifact="b", files={"m": "1"})]))
    assert good.read_bytes() == before


def test_only_a_page_is_replaced(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write("good.json", [report([5])])
    for _ in range(2):
        assert vitkit("report", good)[1] == "the page is report.html\n"
    page = Path("report.html").read_text("utf-8")
    for other in ("", "<title>My report</title>", "\xff" * 3000 + page):
        Path("report.html").write_text(other, "utf-8")
        assert "report.html is no page of vitkit report" in vitkit("report", good, code=2)[1]
        assert Path("report.html").read_text("utf-8") == other


def test_no_torch_is_needed():
    code = "import sys, vitkit.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command(write, tmp_path):
    bench, accuracy = write("bench.json", [report([5, 6])]), write("acc.json", evaluation())
    out, told = vitkit("report", bench, accuracy, "-o", tmp_path / "new" / "report.html")
    assert (out, told) == ("", f"the page is {tmp_path / 'new' / 'report.html'}\n")
    assert (tmp_path / "new" / "report.html").read_text("utf-8") == made(bench, accuracy)
    bad = write("bad.json", "{")
    assert "bad.json cannot be read as JSON" in vitkit("report", bad, "-o", tmp_path / "x.html", code=2)[1]
    assert not (tmp_path / "x.html").exists()
