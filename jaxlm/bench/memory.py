"""The memory of processes while something happens; needs psutil."""

import contextlib
import threading

import psutil


class Peak:
    """`bytes`: the most resident within it, of a process and its children together."""

    def __init__(self, pid: int | None = None):
        """`pid` None is this process."""
        self.process, self.bytes = psutil.Process(pid), 0

    def __enter__(self) -> "Peak":
        self.before = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, self._resident())

    def _resident(self) -> int:
        total = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self.process, *self.process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
        return total
