"""A plan that says something else than llama-server then takes fails here."""

from __future__ import annotations

from pathlib import Path

import pytest
import tools
from kvtc_gguf.dry_run import BESIDE, CACHE, COMPUTE, OUTPUT, DryRun
from process import serve

from bench.logs import WEIGHTS


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every other layer has a sliding window, and a cache of its own size."""
    return tools.adapted_model(tmp_path_factory.mktemp("gemma2") / "gemma2.gguf", "gemma2")


@pytest.mark.parametrize(
    "cache, slots, unified, window",
    [("f16", 1, False, -1), ("q8_0", 3, False, -1), ("kvtc-k2v4", 3, True, -1), ("kvtc-k3v4", 2, False, 512)],
)
def test_sizes_are_what_the_server_allocates(
    gemma2: Path, tmp_path: Path, cache: str, slots: int, unified: bool, window: int
) -> None:
    n_ctx = 16384 * slots
    with DryRun(gemma2, window=window) as run:
        sizes = run.sizes(cache, n_ctx, slots, unified)
    key, value = (f"kvtc{cache[6]}", f"kvtc{cache[8]}") if cache.startswith("kvtc") else (cache, cache)
    arguments = [
        "-c",
        n_ctx,
        "-np",
        slots,
        "-ctk",
        key,
        "-ctv",
        value,
        "-fit",
        "off",
        "--load-mode",
        "none",
        "--no-warmup",
    ]
    arguments += ["--kv-unified"] if unified else []
    arguments += ["--kvtc-window", window] if window >= 0 else []
    with serve(tmp_path, gemma2, *arguments) as server:
        log = server.log.read_text()
    taken = {
        "weights": sum(float(mib) for _, mib in WEIGHTS.findall(log)),
        "codes": sum(float(line["mib"]) for line in CACHE.finditer(log)),
        "exact": sum(float(line["exact"]) for line in BESIDE.finditer(log)),
        "bases": sum(float(line["bases"]) for line in BESIDE.finditer(log)),
        "compute": sum(dict((name, float(mib)) for name, mib in COMPUTE.findall(log)).values())
        + sum(map(float, OUTPUT.findall(log))),
    }
    assert sizes.total == pytest.approx(sum(taken.values()), rel=0.03), (sizes, taken)
    for name, mib in taken.items():
        assert getattr(sizes, name) == pytest.approx(mib, rel=0.03, abs=0.05), (name, sizes, taken)
