"""What llama.cpp's logs say: how large a cache is, part by part, what it really is, and why a run failed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvtc_gguf.dry_run import BESIDE, CACHE, COMPUTE

TRACE = "4"  # the verbosity (-lv) at which the library says how large its caches are
EXACT = re.compile(r"\((?P<sink>\d+) sinks, window (?P<window>\d+)")
WEIGHTS = re.compile(r"\w+:\s+(\S+) model buffer size =\s*([\d.]+) MiB")
ROTATION = re.compile(r"attn_rot_([kv]) = (\d)")


class RunError(Exception):
    """A tool failed or printed nothing usable; the message is one line for the user."""


@dataclass(frozen=True)
class Sizes:
    """One run's caches, in MiB: codes (a stock type's K and V), exact rows, bases; and llama.cpp's compute buffers, of
    which `host` lie in the host's memory, and the weights that lie in devices'.

    The rest is what the run really did, which need not be what it was asked for: types of K and V, exact tokens (None:
    it has none), bits per value (None: the log does not say), rotation ("k", "v", "k+v", "none", "" not said).
    """

    codes: float
    exact: float = 0.0
    bases: float = 0.0
    compute: float = 0.0
    host: float = 0.0
    weights: float = 0.0
    type_k: str = ""
    type_v: str = ""
    sink: int | None = None
    window: int | None = None
    bpv: float | None = None
    rotation: str = ""
    device: float | None = None  # the most in use on all GPUs while it ran, where nvidia-smi tells

    @property
    def cache(self) -> float:
        """What a context's cache takes, everything beside the codes counted."""
        return self.codes + self.exact + self.bases


def parse_sizes(log: str) -> Sizes:
    """The caches that a verbose run names.

    llama.cpp prints a line for each cache (two with sliding windows), kvtc one more that adds what is beside the codes,
    ``llama_kv_cache: size = 11.95 MiB (…)`` and ``…: B bpv, codes X MiB, exact rows Y MiB (…), bases Z MiB``; the codes
    are the tensors of the first line. Bits per value of several caches are averaged over their values.

    Raises:
        RunError: it does not say how large its cache is.
    """
    caches = list(CACHE.finditer(log))
    if not caches:
        raise RunError("the log does not tell the size of the KV cache")
    beside = list(BESIDE.finditer(log))
    values = sum(float(line["codes"]) / float(line["bpv"]) for line in beside)
    buffers = dict(COMPUTE.findall(log))  # of each device, the last reservation
    exact = EXACT.search(log)
    turned = dict(ROTATION.findall(log))
    rotation = "+".join(side for side in "kv" if turned.get(side) == "1") or ("none" if turned else "")
    return Sizes(
        codes=sum(float(line["mib"]) for line in caches),
        exact=sum(float(line["exact"]) for line in beside),
        bases=sum(float(line["bases"]) for line in beside),
        compute=sum(map(float, buffers.values())),
        host=sum(float(mib) for name, mib in buffers.items() if _on_host(name)),
        weights=sum(float(mib) for name, mib in WEIGHTS.findall(log) if not _on_host(name)),
        type_k=caches[-1]["k"] or "",
        type_v=caches[-1]["v"] or "",
        sink=int(exact["sink"]) if exact else None,
        window=int(exact["window"]) if exact else None,
        bpv=sum(float(line["codes"]) for line in beside) / values if values else None,
        rotation=rotation,
    )


def _on_host(buffer: str) -> bool:
    return buffer.startswith("CPU") or buffer.endswith("_Host")


def reason(log: str) -> str:
    """The line of a failed run's log that is most likely to say why."""
    # without time and level, so that the same reason reads the same
    lines = [re.sub(r"^[\d.]+ ([EWI]) +", r"\1 ", line.strip()) for line in log.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"error|\bE\b|failed|unsupported|invalid|abort", line, re.IGNORECASE)
    ]
    return (telling or lines or ["no output"])[0 if telling else -1][:300]
