"""numpy's BLAS on one thread, for code whose products are small."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_one_at_a_time = threading.Lock()


@cache
def _controller() -> ThreadpoolController:
    # It looks through all loaded libraries, once.
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, every matrix product of the process uses one thread only.

    OpenBLAS' threads spin for some milliseconds after a product and take the cores from the network that
    runs next, which costs a quarter of its speed on two cores. A thread that enters while another is inside
    sets no limit of its own, since two limits that overlap would each restore the other's; its products lose
    the limit when the first thread leaves.
    """
    if not _one_at_a_time.acquire(blocking=False):
        yield
        return
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        _one_at_a_time.release()
