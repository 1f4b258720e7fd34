"""numpy's BLAS on one thread, for code whose products are small."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

_limiting = threading.Lock()


@cache
def _controller() -> ThreadpoolController:
    # It looks through all loaded libraries, once.
    return ThreadpoolController()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Inside, numpy's matrix products use the calling thread alone, also those of the process' other threads.

    OpenBLAS' threads spin for some milliseconds after a product, and take the cores from the network that
    runs next: a quarter of its speed on two cores. Who comes while another thread is inside shares its limit
    for as long as it stays: two limits that overlap would restore each other's.
    """
    if not _limiting.acquire(blocking=False):
        yield
        return
    try:
        with _controller().limit(limits=1, user_api="blas"):
            yield
    finally:
        _limiting.release()
