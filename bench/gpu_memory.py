"""What a GPU has in use while a command runs."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

SMI = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


@dataclass
class Peak:
    """The most MiB in use on the devices together, since the watch began; None where nvidia-smi does not tell."""

    mib: float | None = None
    _end: threading.Event = field(default_factory=threading.Event)

    def watch(self, seconds: float) -> None:
        while not self._end.is_set():
            try:
                lines = subprocess.run(SMI, capture_output=True, text=True, timeout=10, check=True).stdout.split()
                self.mib = max(self.mib or 0.0, sum(map(float, lines)))
            except (OSError, ValueError, subprocess.SubprocessError):
                return
            self._end.wait(seconds)

    def stop(self) -> None:
        self._end.set()


@contextmanager
def watched(seconds: float = 0.5) -> Iterator[Peak]:
    """Ask nvidia-smi every so many seconds while the block runs."""
    peak = Peak()
    thread = threading.Thread(target=peak.watch, args=(seconds,), daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.stop()
        thread.join()
