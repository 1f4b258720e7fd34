"""Errors that leave their process arrive as they were."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest
import tomllib

import vitkit
from vitkit import MissingBackend, VitkitError

ROOT = Path(__file__).resolve().parents[2]


def classes() -> set[type[VitkitError]]:
    """VitkitError and all its subclasses, wherever vitkit defines them; only those modules are imported."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    definitions = {}
    for package, folder in project["package-dir"].items():
        for path in (ROOT / folder).glob("*.py"):
            module = package if path.stem == "__init__" else f"{package}.{path.stem}"
            for name, bases in re.findall(r"^class (\w+)\((.*)\):", path.read_text("utf-8"), re.MULTILINE):
                definitions[name] = (module, set(re.findall(r"\w+", bases)))
    found: set[str] = set()
    new = {"VitkitError"}
    while new:
        found |= new
        new = {name for name, (_, bases) in definitions.items() if bases & found} - found
    return {getattr(importlib.import_module(definitions[name][0]), name) for name in found}


def test_every_error_survives_pickling():
    found = classes()
    assert {"MissingBackend", "RunFailed", "BadInput"} <= {kind.__name__ for kind in found}
    arguments = {"MissingBackend": ("onnxruntime", "onnx", ImportError("no such file"), "pip install x")}
    for kind in found:
        error = kind(*arguments.get(kind.__name__, ("what is wrong",)))
        error.note = "an attribute"
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            copy = pickle.loads(pickle.dumps(error, protocol))
            assert type(copy) is kind
            assert str(copy) == str(error) != ""
            assert copy.__dict__ == error.__dict__


def test_a_missing_backend_names_the_cause_and_the_cure():
    error = MissingBackend("onnxruntime", "onnx", ImportError("libfoo.so"))
    assert str(error) == (
        "the package 'onnxruntime' is needed and cannot be imported (libfoo.so); "
        "install it with: pip install 'vitkit[onnx]'"
    )
    assert str(MissingBackend("a", "b", remedy="pip install 'numpy<2'")).endswith("; pip install 'numpy<2'")
    assert (error.package, error.extra, error.cause) == ("onnxruntime", "onnx", "libfoo.so")


def miss(_):
    raise MissingBackend("onnxruntime", "onnx", ImportError("libfoo.so"))


def test_it_arrives_from_a_worker():
    pool = multiprocessing.get_context("fork").Pool(1)
    with pool, pytest.raises(MissingBackend, match=r"libfoo\.so.*vitkit\[onnx\]"):
        # Without a limit a broken error would hang here for ever.
        pool.map_async(miss, [1]).get(60)


def test_a_vendor_that_is_broken_in_whatever_way_is_a_missing_backend(monkeypatch):
    from vitkit.runtimes import engine

    for error in (ImportError("a"), OSError("b"), SystemError("c"), AttributeError("d")):

        def fail(name, error=error):
            raise error

        monkeypatch.setattr(engine, "import_module", fail)
        with pytest.raises(MissingBackend, match=f"'onnxruntime'.*{error}") as caught:
            engine.runtime_module("onnx")
        assert caught.value.__cause__ is error


def test_names_are_exported():
    assert {kind.__name__ for kind in classes() if kind.__module__ == "vitkit.runtimes.errors"} <= set(
        vitkit.__all__
    )
