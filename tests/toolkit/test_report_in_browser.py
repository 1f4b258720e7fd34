"""The page of `vitkit report` as a reader meets it, in headless Chromium."""

from __future__ import annotations

import numpy as np
import pytest
from browser import Browser
from test_bench import report
from test_report import evaluation, hostile_results

from vitkit.report.page import page
from vitkit.report.results import Results, _checked

pytest.importorskip("matplotlib")

VIEWS = {
    "desktop": {},
    "dark": {"scheme": "dark"},
    "phone": {"width": 390},
    "dark phone": {"width": 390, "scheme": "dark"},
    "print": {"media": "print", "width": 1040},
}
# WCAG's contrast ratio of every text with the first opaque colour behind it; smallest first.
CONTRASTS = """
function light(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
  return "rgb(255, 255, 255)";
}
const found = [];
const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
  if (!text) continue;
  const style = getComputedStyle(element);
  const [a, b] = [element.closest("svg") ? style.fill : style.color, behind(element)].map(light);
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
}
return found.sort((one, other) => one[0] - other[0]);
"""
# Texts of pictures that reach out of their picture, and what is wider than the page.
CUT_OFF = """
const out = [];
for (const text of document.querySelectorAll("svg text")) {
  const [inner, outer] = [text.getBoundingClientRect(), text.closest("svg").getBoundingClientRect()];
  if (inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1
      || inner.bottom > outer.bottom + 1) out.push(text.textContent);
}
const wide = document.scrollingElement.scrollWidth - document.documentElement.clientWidth;
if (wide > 0) out.push(`the page is ${wide} pixels too wide`);
return out;
"""
ORDER = """
return [...document.querySelectorAll('[aria-label="Latency, scope engine"] tbody tr')]
  .map(row => row.cells[0].textContent);
"""


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, results in {"real": measured(), "hostile": hostile_results()}.items():
        (folder / f"{name}.html").write_text(page(results), encoding="utf-8")
    return folder


def measured() -> Results:
    """Two devices, five artifacts; the artifact `few` has too few queries for a p90."""
    rng = np.random.default_rng(0)
    reports, evaluations = [], []
    for i, (name, milliseconds, queries) in enumerate(
        [
            ("onnx-fp32", 17, 300),
            ("onnx-int8", 9, 700),
            ("openvino-fp32", 16, 300),
            ("few", 12, 20),
            ("b10", 6, 70),
        ]
    ):
        files = {"model": str(i)}
        times = (milliseconds * 1e6 * (1 + rng.gamma(1, 0.05, queries))).astype(int).tolist()
        for device, factor in (("cpu", 1), ("a board", 3)):
            reports.append(
                report(
                    [factor * time for time in times],
                    rounds=[j // 10 for j in range(queries)],
                    artifact=name,
                    files=files,
                    device=device,
                    started=f"2026-11-21T09:19:0{factor}",
                    size_bytes=10**7,
                )
            )
        evaluations.append(_checked(evaluation(name, files=files, top1=70.0 + i)))
    return Results(reports, evaluations)


def names(browser) -> list[str]:
    return browser.run(ORDER)


def test_the_console_is_heard(browser, tmp_path):
    """Else the absence of errors would prove nothing."""
    (tmp_path / "broken.html").write_text("<script>throw new Error('planted')</script>")
    browser.open(tmp_path / "broken.html")
    assert "planted" in browser.errors()[0]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["real", "hostile"])
def test_nothing_is_cut_off_or_faint_and_the_console_is_silent(browser, pages, name, view):
    browser.show(**VIEWS[view])
    browser.open(pages / f"{name}.html")
    assert browser.run(CUT_OFF) == []
    faintest = browser.run(CONTRASTS)[0]
    assert faintest[0] >= 4.5, faintest
    assert browser.run("return window.hacked ?? null") is None
    assert browser.run("return performance.getEntriesByType('resource').map(one => one.name)") == []
    assert browser.errors() == []


def test_the_scheme_follows_the_reader_and_paper_is_white(browser, pages):
    colours = {}
    for view in ("desktop", "dark", "print"):
        browser.show(**VIEWS[view])
        browser.open(pages / "real.html")
        colours[view] = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert colours["desktop"] == colours["print"] == "rgb(255, 255, 255)"
    assert colours["dark"] == "rgb(20, 24, 29)"
    browser.show(media="print", scheme="dark")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_click_sorts_by_number_and_by_text_both_ways(browser, pages):
    browser.show()
    browser.open(pages / "real.html")
    titles = browser.run(
        "return [...document.querySelectorAll('[aria-label=\"Latency, scope engine\"] thead th')]"
        ".map(th => th.textContent)"
    )

    def click(title):
        browser.click(f'[aria-label="Latency, scope engine"] th:nth-child({titles.index(title) + 1}) button')
        return names(browser)

    assert names(browser)[0] == "b10"
    by_name = sorted(2 * ["b10", "few", "onnx-fp32", "onnx-int8", "openvino-fp32"])
    assert click("artifact") == by_name
    assert click("artifact") == by_name[::-1]
    # Slower on the board by a factor of three; where p90 is not known the row comes last both times.
    rising = click("p90 ms")
    falling = click("p90 ms")
    assert rising[:3] == ["b10", "onnx-int8", "openvino-fp32"]
    assert falling[:2] == ["onnx-fp32", "openvino-fp32"]
    assert rising[-2:] == falling[-2:] == ["few", "few"]
    assert browser.run("return document.querySelectorAll('[aria-sort]').length") == 1
    assert browser.errors() == []
