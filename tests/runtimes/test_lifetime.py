"""Sessions from opening to end: closing while others run, forks, pickling, and the vendors' failures."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import IMAGE, write_tiny

import vitkit
from vitkit import BadRequest, RunFailed, TensorSpec
from vitkit.runtimes.lifetime import Lifetime

TARGETS = ("onnx", "openvino", "tflite")
FORKED = "opened in another process; open it after the fork"


@pytest.fixture(params=TARGETS)
def tiny(request, tmp_path) -> Path:
    return write_tiny(tmp_path / request.param, request.param)


def in_child(work) -> int:
    """The exit code of a forked child that does `work`; fails if it takes longer than 30 s."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(99)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def refusal(call) -> str:
    with pytest.raises(BadRequest) as caught:
        call()
    return str(caught.value)


# Ends in another thread

AWAY = """
import gc, os, signal, sys, threading
import numpy as np
import vitkit

image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

def end():
    global engine
    engine(image)
    engine.close()
    engine = None
    gc.collect()

for _ in range(3):
    engine = vitkit.open_engine(sys.argv[1])
    engine(image)
    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
    os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_another_thread_closed_the_engine(tiny):
    """OpenVINO left the main thread an alternate signal stack that was no longer there."""
    done = subprocess.run([sys.executable, "-c", AWAY, str(tiny)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["handled"] * 3), done.stderr


# Forks

# What a child does with an engine that its parent opened, and how it ends, always with exit code 7.
ENDINGS = {
    "exit": "sys.exit(7)",
    "end": "atexit.register(os._exit, 7)",
    "del": "del engine; gc.collect(); os._exit(7)",
    "del, then exit": "del engine; gc.collect(); sys.exit(7)",
    "close": "says(engine.close); sys.exit(7)",
    "with": "says(engine.__exit__, None, None, None); sys.exit(7)",
    "with, left by an exit": "with engine: sys.exit(7)",
    "run": "says(engine, image); says(engine.run, {'x': image[None]}); says(engine.operators); sys.exit(7)",
    "opened anew": "child = vitkit.open_engine(path); assert child(image).label == '11'; sys.exit(7)",
}
PROGRAM = """
import atexit, gc, json, os, sys
import numpy as np
import vitkit

image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)

def says(call, *arguments):
    try:
        call(*arguments)
    except vitkit.BadRequest as error:
        assert "opened in another process; open it after the fork" in str(error), error
    else:
        raise AssertionError(f"{call} says nothing")

path, ending = sys.argv[1:]
engine = vitkit.open_engine(path, threads=2)
engine(image)
for name, ending in json.loads(ending).items():
    print(name, flush=True)
    if os.fork() == 0:
        exec(ending)
        break
    code = os.waitstatus_to_exitcode(os.wait()[1])
    assert code == 7, (name, code)
    # The child took nothing away.
    assert engine(image).label == "11"
else:
    engine.close()
"""


def test_forked_children_end_and_touch_nothing(tiny):
    command = [sys.executable, "-c", PROGRAM, str(tiny), json.dumps(ENDINGS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        watch = threading.Timer(60, program.kill)
        watch.start()
        out, err = program.communicate()
        watch.cancel()
    assert (program.returncode, out.splitlines()) == (0, list(ENDINGS)), f"{out.splitlines()[-1:]}: {err}"


def use(engine):
    return engine(IMAGE)


@pytest.fixture
def shared(tiny):
    """An engine that forked workers find in this module."""
    with vitkit.open_engine(tiny, threads=1) as engine:
        global _shared
        _shared = engine
        yield engine


def use_shared(_):
    return _shared(IMAGE)


def test_a_pool_of_forked_workers_gets_the_error(shared):
    with multiprocessing.get_context("fork").Pool(2) as pool, pytest.raises(BadRequest, match=FORKED):
        pool.map_async(use_shared, range(4)).get(60)
    assert shared(IMAGE).label == "11"


def test_engines_and_sessions_are_neither_pickled_nor_copied(tiny):
    with vitkit.open_engine(tiny, threads=1) as engine:
        for thing in (engine, engine.session):
            for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
                assert "vitkit.open_engine" in refusal(lambda attempt=attempt, thing=thing: attempt(thing))
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(1) as pool, pytest.raises(BadRequest, match=r"vitkit\.open_engine"):
            pool.apply(use, (engine,))


def test_a_closed_engine_stays_closed_in_a_child(tiny):
    engine = vitkit.open_engine(tiny, threads=1)
    engine.close()

    def child():
        engine.close()
        os._exit(0 if "is closed" in refusal(lambda: engine(IMAGE)) else 1)

    assert in_child(child) == 0


def test_a_fork_during_a_run_leaves_no_lock_behind():
    """The thread that runs is not there in the child, and would never give its lock back."""
    session = Slow()
    lifetime = Lifetime(session, Path("a"))
    lifetime._changed.acquire()

    def child():
        good = FORKED in refusal(lambda: lifetime.enter(object())) and FORKED in refusal(lifetime.close)
        os._exit(0 if good and not session.closed else 1)

    code = in_child(child)
    lifetime._changed.release()
    assert code == 0


# Closing


class Slow:
    """A session whose runs take a while, and that notices a run after or during its end."""

    def __init__(self):
        self.closed, self.faults, self.closings = False, [], 0
        self.started = threading.Event()

    def run(self, feeds):
        self.started.set()
        for _ in range(5):
            if self.closed:
                self.faults.append("ran while closed")
            time.sleep(0.01)
        return {"logits": np.zeros((1, 12), np.float32)}

    def close(self):
        self.closed = True
        self.closings += 1


def slow_engine(tmp_path):
    from vitkit.runtimes.card import read_artifact
    from vitkit.runtimes.engine import Engine
    from vitkit.runtimes.tasks import decoder

    artifact = read_artifact(write_tiny(tmp_path / "slow", "onnx"))
    return Engine(artifact, Slow(), decoder(artifact.card), "cpu")


def test_closing_waits_for_the_calls_that_run(tmp_path):
    engine = slow_engine(tmp_path)
    results = []
    threads = [threading.Thread(target=lambda: results.append(engine(IMAGE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    engine.session.started.wait()
    closers = [threading.Thread(target=engine.close) for _ in range(3)]
    for thread in closers:
        thread.start()
    engine.close()
    assert engine.session.closed
    for thread in threads + closers:
        thread.join()
    assert engine.session.faults == []
    assert engine.session.closings == 1
    assert results


def test_a_signal_handler_may_close_the_engine_that_it_interrupts(tmp_path):
    engine = slow_engine(tmp_path)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: engine.close())
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        assert len(engine(IMAGE).top) == 5
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert engine.session.closings == 1
    assert engine.session.faults == []
    assert "is closed" in refusal(lambda: engine(IMAGE))


def test_calls_of_many_threads_finish_or_say_that_it_is_closed(tiny):
    expected = {"11", "closed"}
    for _ in range(5):
        engine, found = vitkit.open_engine(tiny, threads=1), []

        def work(engine=engine, found=found):
            try:
                for _ in range(1000):
                    found.append(engine(IMAGE).label)
                    engine.operators()
            except BadRequest as error:
                found.append("closed" if "is closed" in str(error) else str(error))
            except BaseException as error:
                found.append(repr(error))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        engine.close()
        for thread in threads:
            thread.join()
        assert set(found) <= expected
        assert "closed" in found


# Failures while running


def gather_graph() -> bytes:
    """Takes the value at the place that the first pixel names, of 12: ONNX Runtime fails beyond."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"], axis=1),
        helper.make_node("Flatten", ["x"], ["bytes"], axis=1),
        helper.make_node("Cast", ["bytes"], ["places"], to=TensorProto.INT64),
        helper.make_node("GatherElements", ["flat", "places"], ["logits"], axis=1),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "gather",
        [value("x", TensorProto.UINT8, [1, 2, 2, 3])],
        [value("logits", TensorProto.FLOAT, [1, 12])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def test_what_a_vendor_cannot_run_is_a_vitkit_error(tmp_path):
    pytest.importorskip("onnx")
    folder = write_tiny(tmp_path / "a", "onnx", gather_graph())
    with vitkit.open_engine(folder, threads=1) as engine:
        assert engine(IMAGE).label == "11"
        with pytest.raises(RunFailed, match=r"a failed while it ran: \w+: .*[Oo]ut of range") as caught:
            engine(IMAGE + np.uint8(200))
        assert "onnxruntime" in type(caught.value.__cause__).__module__
        assert engine(IMAGE).label == "11"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("no memory"), ValueError("x"), OSError(12, "m")]
)
def test_whatever_the_vendor_raises_is_kept(tiny, monkeypatch, error):
    with vitkit.open_engine(tiny, threads=1) as engine:

        def fail(feeds):
            raise error

        monkeypatch.setattr(engine.session, "run", fail)
        with pytest.raises(RunFailed, match=re.escape(f"{type(error).__name__}: {error}".rstrip())) as caught:
            engine(IMAGE)
        assert caught.value.__cause__ is error
        monkeypatch.undo()
        assert engine(IMAGE).label == "11"


# Outputs that are not finite


def broken_graph(value: float, second: bool = False) -> bytes:
    """The tiny graph with a constant added to its logits; or beside them, where decoding needs it not."""
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"], axis=1),
        helper.make_node("Add", ["flat", "value"], ["other" if second else "logits"]),
    ]
    constant = helper.make_tensor("value", TensorProto.FLOAT, [12], [0.0] * 10 + [value] * 2)
    info = helper.make_tensor_value_info
    outputs = [info("logits", TensorProto.FLOAT, [1, 12])]
    if second:
        nodes.append(helper.make_node("Identity", ["flat"], ["logits"]))
        outputs.append(info("other", TensorProto.FLOAT, [1, 12]))
    graph = helper.make_graph(nodes, "g", [info("x", TensorProto.UINT8, [1, 2, 2, 3])], outputs, [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_outputs_that_are_not_finite_are_an_error_of_the_engine(target, value, tmp_path):
    pytest.importorskip("onnx")
    folder = write_tiny(tmp_path / "a", target, broken_graph(value))
    with vitkit.open_engine(folder, threads=1) as engine:
        with pytest.raises(
            RunFailed, match=r"a returned 2 NaN or infinite values of 12 in its output 'logits'"
        ):
            engine(IMAGE)
        with pytest.raises(RunFailed, match="output 'logits'"):
            engine([IMAGE, IMAGE])
        # Raw outputs are the vendor's own.
        raw = engine.run({"x": IMAGE[None]})["logits"]
        assert np.isfinite(raw).sum() == 10


def test_every_output_is_looked_at(tmp_path):
    pytest.importorskip("onnx")
    both = (TensorSpec("logits", (1, 12), "float32"), TensorSpec("other", (1, 12), "float32"))
    for value, fails in ((1.0, False), (float("nan"), True)):
        folder = write_tiny(tmp_path / str(value), "onnx", broken_graph(value, second=True), outputs=both)
        with vitkit.open_engine(folder, threads=1) as engine:
            if fails:
                with pytest.raises(RunFailed, match="output 'other'"):
                    engine(IMAGE)
            else:
                assert engine(IMAGE).label == "11"
