"""The life of a session: calls that still run when it is closed, and forks of its process."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from threading import Condition, get_ident
from typing import Protocol
from weakref import WeakSet

from vitkit.runtimes.errors import BadRequest


class Closable(Protocol):
    """What has to be closed."""

    def close(self) -> None:
        """Free everything."""
        ...


class Lifetime:
    """Counts the calls that run, so that the last one, or `close`, closes the session and nothing else does.

    In a forked child the vendor's threads are missing, and its destructors would wait for them for ever. So a
    session that the parent opened is neither run nor freed there.
    """

    def __init__(self, session: Closable, path: Path) -> None:
        self.inherited = False
        self._session, self._path = session, path
        # Why there are no more calls; None while the session is open.
        self._refusal: str | None = None
        self._freed = False
        self._changed = Condition()
        # The thread of each call that runs.
        self._calls: dict[object, int] = {}
        _all.add(self)

    def check(self) -> None:
        """Raises BadRequest if there are no more calls."""
        if self._refusal is not None:
            raise BadRequest(self._refusal)

    def enter(self, call: object) -> None:
        """Begin a call, named by an object of its own; raises BadRequest if the session is closed."""
        # First without the lock, which a fork may have left in the hands of a thread that is gone.
        self.check()
        with self._changed:
            self.check()
            self._calls[call] = get_ident()

    def leave(self, call: object) -> None:
        """End a call, whether it began or not."""
        with self._changed:
            self._calls.pop(call, None)
            self._free_if_idle()

    def close(self) -> None:
        """Refuse further calls and free the session once those that run have ended; harmless if repeated.

        Raises BadRequest in a forked child of the process that opened it.
        """
        if self.inherited:
            self.check()
        with self._changed:
            self._refusal = self._refusal or f"the engine of {self._path} is closed; open it again"
            self._free_if_idle()
            # A signal handler may interrupt a call of this thread, which ends only after the handler.
            if get_ident() not in self._calls.values():
                self._changed.wait_for(lambda: self._freed)

    def _free_if_idle(self) -> None:
        if self._refusal is not None and not self._calls and not self._freed:
            self._freed = True
            self._changed.notify_all()
            self._session.close()

    def inherit(self) -> None:
        """In a forked child: keep the session as it is, whatever becomes of the engine."""
        self._changed = Condition()
        if self._freed:
            return
        # As if it were freed, which here is never done.
        self.inherited = self._freed = True
        self._refusal = f"the engine of {self._path} was opened in another process; open it after the fork"
        hold_for_ever(self._session)


_all: WeakSet[Lifetime] = WeakSet()


def hold_for_ever(thing: object) -> None:
    """Take a reference that nobody gives back: not even the end of the interpreter destroys `thing`."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _inherit_all() -> None:
    for lifetime in list(_all):
        lifetime.inherit()


# Windows has no forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit_all)
