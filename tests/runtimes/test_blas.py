from __future__ import annotations

import os
import subprocess
import sys

import pytest
from threadpoolctl import ThreadpoolController

from vitkit.runtimes.blas import one_blas_thread


@pytest.fixture
def threads():
    """Threads of numpy's BLAS now; two of them before."""
    controller = ThreadpoolController().select(user_api="blas")
    if not controller.lib_controllers:
        pytest.skip("numpy's BLAS here is none that threadpoolctl knows")
    with controller.limit(limits=2):
        yield lambda: [library["num_threads"] for library in controller.info()]


def test_one_thread_inside_and_as_many_as_before_afterwards(threads):
    before = threads()
    with one_blas_thread():
        assert set(threads()) == {1}
        with one_blas_thread():
            assert set(threads()) == {1}
        assert set(threads()) == {1}
    assert threads() == before
    with pytest.raises(ZeroDivisionError), one_blas_thread():
        raise ZeroDivisionError
    assert threads() == before


def test_overlapping_users_leave_the_limit_as_it_was(threads):
    # A process of its own: where one thread holds a limit, threadpoolctl lets no other change it.
    code = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from threadpoolctl import ThreadpoolController
from vitkit.runtimes.blas import one_blas_thread

controller, matrix, seen = ThreadpoolController().select(user_api="blas"), np.ones((64, 64)), set()
def threads(): return controller.info()[0]["num_threads"]
def work(_):
    for _ in range(100):
        with one_blas_thread():
            matrix @ matrix
            seen.add(threads())
before = threads()
with ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(8)))
print(before, threads(), 1 in seen)
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "2 2 True\n", done.stderr
