"""Watching over a run: who went away, who failed, who was told to stop, and whether steps end.

The processes of a run tell each other through the coordination service's key-value store, which
lives in process 0. A thread in each of them looks there twice a second:

    beat/3          a number that process 3 raises; process 0 notices when it stops
    news/failure    what ended the run, written once by the first to know
    news/told       the signal that somebody got
    left/3          process 3 knows of the failure and is going
    at/3            the last step process 3 may have begun when it read `told`
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from jaxlm.cli import EXIT_LOST

LOOK_SECONDS = 0.5
BEAT_SECONDS = 2.0
LOST_SECONDS = 20.0
LEAVE_SECONDS = 10.0


class Stop:
    """When a run that was told to stop does so: after the same step in every process.

    The processes' loops are not in step: one may be several steps ahead in handing work to its
    devices, and all need each other to finish it. So each notes the last step it may have begun
    and begins no other until it knows what the others noted; the highest of these is the last.
    """

    def __init__(self, alone: bool = True):
        self.signal: int | None = None
        self._alone = alone
        self._begun: int | None = None
        self._frozen = False
        self._last: int | None = None
        self._changed = threading.Condition()

    def begin(self, step: int) -> None:
        """The loop starts, with `step` updates done."""
        with self._changed:
            self._begun = step + 1

    def tell(self, number: int) -> None:
        """This process was told to stop, by this signal. Safe in a signal's handler."""
        self.signal = number

    def due(self, step: int) -> bool:
        """Whether `step`, which was just done, is the last one; if not, the next has begun."""
        if self._alone:
            return self.signal is not None
        with self._changed:
            while self._frozen and self._last is None:
                self._changed.wait()
            if self._last is not None:
                return step >= self._last
            self._begun = step + 1
            return False

    def freeze(self, number: int) -> int | None:
        """Let no further step begin; returns the last that may have, or None before `begin`."""
        with self._changed:
            if self._begun is None:
                return None
            self.signal = number
            self._frozen = True
            return self._begun

    def settle(self, last: int) -> None:
        """Go on up to the step `last`."""
        with self._changed:
            self._last = last
            self._changed.notify_all()


class Watch:
    """The thread that looks; `client` is the coordination service's, `hosts` by process."""

    def __init__(self, client, index: int, hosts: list[str], stop: Stop):
        self.before_leaving: list[Callable[[], None]] = []
        self._client = client
        self._index = index
        self._hosts = hosts
        self._stop = stop
        # Who never says a word is missed too.
        now = time.monotonic()
        self._beats: dict[str, tuple[str, float]] = {str(i): ("", now) for i in range(len(hosts))}
        self._number = 0
        self._next_beat = 0.0
        self._told = self._noted = self._settled = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking; a thread inside the client when the program ends would abort it."""
        self._ending.set()
        self._thread.join(LEAVE_SECONDS)

    def publish(self, failure: dict) -> bool:
        """Say what ends the run; False if somebody was first."""
        try:
            self._client.key_value_set(_key("news/failure"), json.dumps(failure))
        except Exception:
            return False
        finally:
            self._note_leaving()
        return True

    def wait_for_others(self, lost: int = 0) -> None:
        """In process 0: stay until the others read the failure, because it goes with us."""
        others = len(self._hosts) - lost
        deadline = time.monotonic() + LEAVE_SECONDS
        while self._index == 0 and time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                if len(self._client.key_value_dir_get(_key("left/"))) >= others:
                    return
            time.sleep(LOOK_SECONDS / 5)

    def _look_on(self) -> None:
        while not self._ending.wait(LOOK_SECONDS):
            # Where the service cannot be reached, process 0 is gone: see `name_abort`.
            with contextlib.suppress(Exception):
                self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            self._number += 1
            self._client.key_value_set(_key(f"beat/{self._index}"), str(self._number), True)
            if self._index == 0:
                self._check_beats(now)
        news = dict(_entries(self._client, "news/"))
        if "failure" in news:
            self._leave(json.loads(news["failure"]))
        if self._stop.signal is not None and not self._told:
            self._told = True
            self._client.key_value_set(_key("news/told"), str(self._stop.signal), True)
        elif "told" in news and not self._settled:
            self._agree(int(news["told"]))

    def _agree(self, number: int) -> None:
        if not self._noted:
            begun = self._stop.freeze(number)
            if begun is None:
                return
            self._told = self._noted = True
            self._client.key_value_set(_key(f"at/{self._index}"), str(begun), True)
        begun = [int(value) for _, value in _entries(self._client, "at/")]
        if len(begun) == len(self._hosts):
            self._settled = True
            self._stop.settle(max(begun))

    def _check_beats(self, now: float) -> None:
        for name, value in _entries(self._client, "beat/"):
            if self._beats[name][0] != value:
                self._beats[name] = value, now
        for name, (_, since) in self._beats.items():
            if now - since > LOST_SECONDS:
                text = (
                    f"process {name} on {self._hosts[int(name)]} went away: nothing was heard of "
                    f"it for {LOST_SECONDS:.0f} s; see its own log for why"
                )
                failure = json.dumps({"text": text, "code": EXIT_LOST, "loud": True})
                self._client.key_value_set(_key("news/failure"), failure)

    def _leave(self, failure: dict) -> None:
        if failure.get("process") == self._index:
            return
        self._tidy()
        if failure["loud"]:
            tell_last(f"error: {failure['text']}; what was saved is intact")
        self._note_leaving()
        self.wait_for_others(lost=int("process" not in failure))
        os._exit(failure["code"])

    def _note_leaving(self) -> None:
        with contextlib.suppress(Exception):
            self._client.key_value_set(_key(f"left/{self._index}"), "", True)

    def _tidy(self) -> None:
        """Leave the terminal as it was; what holds a lock is not waited for."""
        for function in self.before_leaving:
            thread = threading.Thread(target=function, daemon=True)
            thread.start()
            thread.join(1.0)


class Stall:
    """Prints every thread's stack when no step was finished for `minutes`; None: never."""

    def __init__(self, minutes: float | None, who: str = ""):
        self._seconds = None if minutes is None else 60 * minutes
        self._who = who
        self._moved = threading.Event()
        self._ending = False
        if self._seconds is not None:
            threading.Thread(target=self._look_on, name="stall", daemon=True).start()

    def step(self) -> None:
        """Something was finished: the time begins anew."""
        self._moved.set()

    def close(self) -> None:
        """Stop looking."""
        self._ending = True
        self._moved.set()

    def _look_on(self) -> None:
        while not self._ending:
            self._moved.clear()
            if self._moved.wait(self._seconds):
                continue
            tell_last(
                f"no step finished for {self._seconds / 60:g} minutes{self._who}; what every "
                "thread is doing:"
            )
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            self._moved.wait()


def tell_last(text: str) -> None:
    """Write a line to stderr past all buffers and locks."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


@contextlib.contextmanager
def name_abort(explain: Callable[[], str | None]):
    """Say `explain()` and leave where JAX aborts the process; None lets the abort happen.

    When the connection to the coordination service breaks or cannot be made, its client ends the
    process by abort(), from a thread of its own; JAX offers no way to be asked first. Python's
    own signal handlers would run in the main thread, which is waiting for a collective.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(number):
        if (text := explain()) is not None:
            tell_last(f"error: {text}")
            os._exit(EXIT_LOST)

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
    set_handler.restype = ctypes.c_void_p
    before = set_handler(signal.SIGABRT, ctypes.cast(aborted, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGABRT, before)


def is_reachable(address: str, seconds: float) -> bool:
    """Whether anybody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False


def _key(name: str) -> str:
    return f"jaxlm/watch/{name}"


def _entries(client, folder: str) -> list[tuple[str, str]]:
    """(name, value) of what is under a folder."""
    prefix = _key(folder)
    return [(key.removeprefix(prefix), value) for key, value in client.key_value_dir_get(prefix)]
