"""Where a GPU's memory goes: a cache's parts and buffers from a log, the device's use while a command runs."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.perplexity import KVTC_SIZES, parse_kv_mib

SMI = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Split:
    """MiB of one run: codes (or a stock type's K and V), exact rows, bases, and llama.cpp's compute buffers."""

    codes: float
    exact: float
    bases: float
    compute: float

    @property
    def cache(self) -> float:
        """What a context's cache takes, everything beside the codes counted."""
        return self.codes + self.exact + self.bases


def parse_split(log: str) -> Split:
    """The parts that a verbose run of llama.cpp names.

    Raises:
        RunError: it does not say how large its cache is.
    """
    beside = {part: sum(float(line[part]) for line in KVTC_SIZES.finditer(log)) for part in ("exact", "bases")}
    buffers = re.findall(r"sched_reserve:\s+(\S+) compute buffer size =\s*([\d.]+) MiB", log)
    compute = sum(dict((name, float(size)) for name, size in buffers).values())  # of each device, the last reservation
    return Split(parse_kv_mib(log) - sum(beside.values()), **beside, compute=compute)


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
