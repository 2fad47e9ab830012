"""A cache as the bench names it: types of K and V, exact tokens, llama.cpp's rotation; and its command line flags."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Bits per value of the stock types, scales included (ggml's block layouts).
STOCK_BPV = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q5_1": 6.0, "q5_0": 5.5, "q4_1": 5.0, "q4_0": 4.5}
STOCK_BPV |= {"iq4_nl": 4.5}
SINK, WINDOW = 4, 128  # tokens: the flags' defaults
PAIR = re.compile(r"kvtc-k(\d)v(\d)")
KVTC = re.compile(r"kvtc(\d)")


@dataclass(frozen=True)
class Cache:
    """A cache type as a user names it: ``q8_0`` for both sides, ``kvtc-k2v4``, or ``K/V`` for any two types.

    The name may be one that an engine does not know: only the engine can tell. sink, window: exact tokens, None for
    what the engine does by itself. rotation: whether llama.cpp may rotate quantised types (LLAMA_ATTN_ROT_DISABLE).
    """

    name: str
    sink: int | None = None
    window: int | None = None
    rotation: bool = True

    @property
    def types(self) -> tuple[str, str]:
        """The types of K and V, as ``-ctk`` and ``-ctv`` take them."""
        if pair := PAIR.fullmatch(self.name):
            return f"kvtc{pair[1]}", f"kvtc{pair[2]}"
        key, _, value = self.name.partition("/")
        return key, value or key

    @property
    def bpv(self) -> float | None:
        """Nominal bits per value, mean of K and V; gains and scales count, exact tokens do not. None: unknown type."""
        bits = [float(x[1]) if (x := KVTC.fullmatch(kind)) else STOCK_BPV.get(kind) for kind in self.types]
        return None if None in bits else sum(bits) / 2

    @property
    def calibrated(self) -> bool:
        """True where a calibration decides the codes."""
        return any(KVTC.fullmatch(kind) for kind in self.types)

    @property
    def label(self) -> str:
        """The name and what differs from the usual exact tokens and rotation; tells caches of a matrix apart."""
        exact = f" {_told(self.sink)}+{_told(self.window)}"
        if (self.sink, self.window) == ((SINK, WINDOW) if self.calibrated else (None, None)):
            exact = ""
        return self.name + exact + ("" if self.rotation else " unrotated")

    @property
    def arguments(self) -> list[str]:
        """The flags that select this cache, the same for every tool."""
        key, value = self.types
        flags = ["-ctk", key, "-ctv", value, "-fa", "on"]
        flags += [] if self.sink is None else ["--kvtc-sink", str(self.sink)]
        return flags + ([] if self.window is None else ["--kvtc-window", str(self.window)])

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.rotation else {"LLAMA_ATTN_ROT_DISABLE": "1"}


def _told(count: int | None) -> str:
    return "default" if count is None else str(count)
