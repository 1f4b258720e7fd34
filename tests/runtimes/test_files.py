from __future__ import annotations

import logging
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest

from vitkit.exporters.verify import _runnable
from vitkit.runtimes import BadArtifact, BadRequest, open_engine
from vitkit.runtimes.card import read_card, write_card
from vitkit.runtimes.files import _temporary_folder, atomic_folder, user_folder

VARIABLES = {"cache": "XDG_CACHE_HOME", "config": "XDG_CONFIG_HOME"}


@pytest.fixture
def no_user(monkeypatch, tmp_path):
    """A user who is in no list of users, as in a container started with `--user 1234`."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", *VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _temporary_folder.cache_clear()
    yield tmp_path
    _temporary_folder.cache_clear()


@pytest.mark.parametrize(("kind", "hidden"), [("cache", ".cache"), ("config", ".config")])
def test_user_folders_follow_their_variables(monkeypatch, tmp_path, kind, hidden):
    monkeypatch.setenv(VARIABLES[kind], str(tmp_path / "x"))
    assert user_folder(kind) == tmp_path / "x" / "vitkit"
    for nothing in ("", None):
        monkeypatch.delenv(VARIABLES[kind]) if nothing is None else monkeypatch.setenv(VARIABLES[kind], "")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert user_folder(kind) == tmp_path / hidden / "vitkit"
    assert not list(tmp_path.iterdir()), "asking makes nothing"


@pytest.mark.parametrize("kind", ["cache", "config"])
def test_without_a_home_files_are_kept_in_a_private_folder(no_user, caplog, kind):
    with caplog.at_level(logging.WARNING, "vitkit"):
        folder = user_folder(kind)
        assert user_folder(kind) == folder
    private = no_user / f"vitkit-{os.getuid()}"
    assert folder == private / kind
    assert private.stat().st_mode & 0o777 == 0o700
    (record,) = caplog.records
    assert f"{VARIABLES[kind]}=DIR" in record.getMessage()
    assert str(private) in record.getMessage()


def test_a_home_that_cannot_be_written_is_none(no_user, monkeypatch):
    """Docker sets HOME to / for a user it does not know; root alone may write there."""
    (no_user / "file").write_text("")
    monkeypatch.setenv("HOME", str(no_user / "file"))
    assert user_folder("cache") == no_user / f"vitkit-{os.getuid()}" / "cache"


@pytest.mark.parametrize("others", ["readable", "link", "file"])
def test_a_folder_that_somebody_else_could_fill_is_refused(no_user, others):
    place = no_user / f"vitkit-{os.getuid()}"
    if others == "readable":
        place.mkdir()
        place.chmod(0o777)
    elif others == "link":
        (no_user / "theirs").mkdir(mode=0o700)
        place.symlink_to(no_user / "theirs")
    else:
        place.write_text("")
    with pytest.raises(BadRequest, match="XDG_CACHE_HOME=DIR"):
        user_folder("cache")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("home", [None, "/"])
def test_a_process_of_an_unknown_user(home):
    # Its modules are imported before, since another user may not read them.
    code = "import os, vitkit.runtimes.files as f; os.setuid(61234); print(f.user_folder('cache'))"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        environment = {"PATH": os.environ["PATH"], "TMPDIR": folder, **({"HOME": home} if home else {})}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == f"{folder}/vitkit-61234/cache", done.stderr


def test_errors_name_the_folder_that_the_user_knows(tmp_path):
    with pytest.raises(BadArtifact) as error, atomic_folder(tmp_path / "out") as folder:
        raise BadArtifact(f"{folder}/model.onnx has no outputs")
    assert str(error.value) == f"{tmp_path}/out/model.onnx has no outputs"
    assert not list(tmp_path.iterdir())


def test_a_twin_that_runs_a_packages_graph_is_named_as_the_package(tmp_path, artifact_of):
    package = tmp_path / "package"
    shutil.copytree(artifact_of("onnx", "fp32"), package)
    write_card(replace(read_card(package), target="tensorrt"), package)
    (package / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BadArtifact) as error, _runnable(package) as twin:
        open_engine(twin)
    assert f"{package}/model.onnx" in str(error.value)
    assert str(twin) not in str(error.value)
