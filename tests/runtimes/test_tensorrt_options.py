"""How engines are built and kept: commands by version, cache keys, and what is said where machines differ."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import replace

import pytest

from vitkit import BadArtifact, DeviceError
from vitkit.runtimes.card import Artifact, ImageSpec, ModelCard
from vitkit.runtimes.tensorrt_options import (
    DIALECTS,
    Machine,
    build_script,
    check_machine,
    check_version,
    dialect_of,
    differences,
    engine_key,
    options_for,
    read_built,
    read_options,
    timing_key,
    trtexec,
)

ORIN = Machine("8.6.2", "8.7", "linux-aarch64")
COMMON = ["trtexec", "--onnx=model.onnx", "--saveEngine=engine.plan", "--timingCacheFile=timing.cache"]
OBEY = ["--precisionConstraints=obey", "--layerPrecisions=a/Add:fp32,b/Mul_2:fp32"]
OBEY += ["--layerOutputTypes=a/Add:fp32,b/Mul_2:fp32"]
COMMANDS = {
    ("8.5", "fp32"): ["--noTF32", "--buildOnly"],
    ("8.5", "fp16"): ["--fp16", *OBEY, "--noTF32", "--buildOnly"],
    ("8.5", "int8"): ["--fp16", "--int8", *OBEY, "--noTF32", "--buildOnly"],
    ("8.6", "fp32"): ["--noTF32", "--skipInference"],
    ("8.6", "fp16"): ["--fp16", *OBEY, "--noTF32", "--skipInference"],
    ("8.6", "int8"): ["--fp16", "--int8", *OBEY, "--noTF32", "--skipInference"],
    ("10", "fp32"): ["--noTF32", "--skipInference"],
    ("10", "fp16"): ["--stronglyTyped", "--noTF32", "--skipInference"],
    ("10", "int8"): ["--fp16", "--int8", *OBEY, "--noTF32", "--skipInference"],
    ("11", "fp32"): ["--noTF32", "--skipInference"],
    ("11", "fp16"): ["--noTF32", "--skipInference"],
    ("11", "int8"): ["--noTF32", "--skipInference"],
}


@pytest.mark.parametrize(("version", "precision"), COMMANDS)
def test_each_version_has_its_command(version, precision, tmp_path):
    options = options_for(version, precision, ("a/Add", "b/Mul_2"))
    assert trtexec(options) == COMMON + COMMANDS[version, precision]
    # The script runs exactly that, inside the artifact's own folder.
    (tmp_path / "build.sh").write_text(build_script(options))
    (tmp_path / "trtexec").write_text(
        '#!/bin/sh\npwd > said\nfor word in "$@"; do echo "$word" >> said; done\n'
    )
    (tmp_path / "trtexec").chmod(0o755)
    shell = f"PATH={shlex.quote(str(tmp_path))}:$PATH sh {shlex.quote(str(tmp_path / 'build.sh'))}"
    subprocess.run(["sh", "-c", shell], check=True, cwd="/")
    said = (tmp_path / "said").read_text().splitlines()
    assert said == [str(tmp_path), *COMMON[1:], *COMMANDS[version, precision]]


@pytest.mark.parametrize(
    ("version", "dialect"),
    [
        ("8.5.2.2", "8.5"), ("8.5", "8.5"), ("8.6.2", "8.6"), ("8.4.1", None), ("8.50", None),
        ("9.3.0", None),
        ("10.0.1", "10"), ("10.13.3.9", "10"), ("11.4", "11"), ("1.0", None), ("", None),
    ],
)  # fmt: skip
def test_dialects_are_found_by_tensorrts_own_version(version, dialect):
    assert dialect_of(version) == dialect


def test_the_key_depends_on_all_that_the_engine_depends_on():
    options = options_for("8.6", "int8", ("a/Add",))
    key = engine_key("ab" * 32, options, ORIN)
    assert key == engine_key("ab" * 32, options_for("8.6", "int8", ("a/Add",)), Machine(*ORIN))
    others = [
        engine_key("ac" * 32, options, ORIN),
        engine_key("ab" * 32, replace(options, flags=("FP16",)), ORIN),
        engine_key("ab" * 32, replace(options, float32_layers=()), ORIN),
        engine_key("ab" * 32, replace(options, strongly_typed=True), ORIN),
        *(engine_key("ab" * 32, options, ORIN._replace(**{name: "x"})) for name in Machine._fields),
    ]
    assert len({key, *others}) == len(others) + 1
    assert all(len(each) == 64 and each.isalnum() for each in others)


def test_timings_are_shared_by_all_engines_of_a_machine():
    assert timing_key(ORIN) == "8.6.2-8.7-linux_aarch64"
    assert "/" not in timing_key(Machine("../8", "a/b", "c\\d"))


def test_what_differs_names_both_sides():
    assert differences(ORIN, ORIN) == []
    here = Machine("10.3.0", "8.7", "linux-x86_64")
    assert differences(ORIN, here) == [
        "TensorRT 8.6.2 there, 10.3.0 here",
        "platform linux-aarch64 there, linux-x86_64 here",
    ]


def test_engines_of_other_machines_are_refused_naming_both_sides(tmp_path):
    made = artifact(tmp_path, build=GOOD, built=ORIN._asdict())
    check_machine(made, ORIN)
    check_machine(artifact(tmp_path, build=GOOD, built=None), Machine("10.3.0", "9.0", "linux-x86_64"))
    with pytest.raises(DeviceError) as caught:
        check_machine(made, Machine("8.6.2", "8.9", "linux-x86_64"))
    text = str(caught.value)
    assert "built by TensorRT 8.6.2, compute capability 8.7, linux-aarch64" in text
    assert "here is TensorRT 8.6.2, compute capability 8.9, linux-x86_64" in text
    assert "compute capability 8.7 there, 8.9 here; platform linux-aarch64 there, linux-x86_64 here" in text
    assert f"vitkit build {tmp_path} -o" in text


def test_packages_for_other_versions_are_refused_naming_both_sides(tmp_path):
    package = artifact(tmp_path, build=GOOD, built=None)
    check_version(package, ORIN)
    with pytest.raises(
        DeviceError, match=r"for TensorRT 8\.6, here is TensorRT 10\.3\.0: .*--trt-version 10"
    ):
        check_version(package, ORIN._replace(tensorrt="10.3.0"))
    with pytest.raises(DeviceError, match=r"here is TensorRT 7\.1\.3: known are 8\.5, 8\.6, 10, 11"):
        check_version(package, ORIN._replace(tensorrt="7.1.3"))


GOOD = {"version": "8.6", "strongly_typed": False, "flags": ["FP16"], "float32_layers": ["a/Add"]}


def artifact(tmp_path, **options):
    card = ModelCard("a", "classification", "tensorrt", "fp16", (), (), ImageSpec((2, 2)), options=options)
    return Artifact(tmp_path, card)


def test_options_come_back_from_the_card(tmp_path):
    assert read_options(artifact(tmp_path, build=GOOD)) == options_for("8.6", "fp16", ("a/Add",))
    assert read_built(artifact(tmp_path, build=GOOD)) is None
    assert read_built(artifact(tmp_path, built=ORIN._asdict())) == ORIN


@pytest.mark.parametrize(
    "change", [{"version": "9"}, {"version": 8.6}, {"strongly_typed": 1}, {"flags": "FP16"}, {"flags": [3]}]
)
def test_hand_written_nonsense_is_refused(change, tmp_path):
    with pytest.raises(BadArtifact, match=r"options\.build"):
        read_options(artifact(tmp_path, build={**GOOD, **change}))


def test_other_nonsense_is_refused_too(tmp_path):
    with pytest.raises(BadArtifact, match=r"options\.build is None"):
        read_options(artifact(tmp_path))
    for built in ("8.6", {"tensorrt": "8.6"}, {**ORIN._asdict(), "more": 1}):
        with pytest.raises(BadArtifact, match=r"options\.built"):
            read_built(artifact(tmp_path, built=built))


def test_every_dialect_is_within_what_its_version_parses():
    from vitkit.exporters.tensorrt_rules import HIGHEST_OPSET, OPERATORS, VERSIONS

    assert tuple(DIALECTS) == VERSIONS
    for version, dialect in DIALECTS.items():
        assert dialect.opset <= HIGHEST_OPSET[version]
        assert dialect.layer_norm == ("LayerNormalization" in OPERATORS[version])
