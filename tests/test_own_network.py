"""docs/own-network.md's blocks work one after another; what would be downloaded is random instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_readme import run

from vitkit.sources import read_card_values

PAGE = (Path(__file__).resolve().parents[1] / "docs/own-network.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_pages_blocks_work_in_order(tmp_path):
    pytest.importorskip("nncf")
    said = []
    for language, text in BLOCKS:
        if language == "toml":
            (tmp_path / "mine.toml").write_text(text)
            continue
        text = text.replace("pretrained=True", "pretrained=False")
        text = re.sub(r"(vitkit export timm:\S+)", r"\1 --untrained", text)
        # torchvision's operators need not fit the torch of a test machine.
        text = text.replace("import timm\n", "from vitkit.torchvision_shim import timm\n")
        said.append(run(language, text, tmp_path))
    assert 0 < float(said[1].split()[-1]) <= 1
    assert read_card_values(tmp_path / "mine.toml").labels == ("cat", "dog", "owl")
    assert {"engine", "engine-openvino", "small", "small-openvino"} <= {p.name for p in tmp_path.iterdir()}


def test_the_first_blocks_are_ten_lines():
    lines = [line for _, text in BLOCKS[:2] for line in text.splitlines() if line.strip()]
    assert len(lines) <= 10
