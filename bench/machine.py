"""The machine that measures, as a table names it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    cpu: str
    gpu: str  # names of all, "" without nvidia-smi
    cores: int  # that this process may use, hyperthreads counted once
    memory: int  # GiB

    @property
    def name(self) -> str:
        return f"{platform.system()} {platform.machine()}, {self.cores} cores, {self.memory} GiB"

    @property
    def slug(self) -> str:
        """A file name for this machine's results."""
        words = f"{self.gpu or self.cpu} {'' if self.gpu else f'{self.cores} cores'}"
        return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", words.lower())).strip("-")


def find() -> Machine:
    return Machine(_cpu(), _gpus(), _cores(), _memory())


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def _gpus() -> str:
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    names = [line.strip() for line in told.stdout.splitlines() if line.strip()] if told.returncode == 0 else []
    return ", ".join(
        f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )


def _cores() -> int:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            return len(usable)
    return len(siblings)


def _memory() -> int:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return 0
