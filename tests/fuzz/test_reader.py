"""A short run of what `make fuzz` does for ten minutes, without coverage to guide it.

Failures caught: a C++ reader of saved states that crashes on damage, reads other rows with vectors than without, or
takes a block that its own encoder would not write.
"""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import seeds
import states

from tests.cxx import ROOT, compiled, llama_cpp

HERE = Path(__file__).parent
N = 20_000  # inputs
# Traps need no library of the sanitizer's, which not every compiler comes with.
CHECKS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-D_GLIBCXX_ASSERTIONS"]


def replayer(folder: Path) -> Path:
    """The target as a program; needs a C++ compiler, as the build does."""
    tree = llama_cpp()
    include = [ROOT / "ggml_kvtc" / "llama", tree / "include", tree / "ggml" / "include"]
    sources = [*sorted((ROOT / "ggml_kvtc").glob("kvtc-rows*.cpp")), HERE / "states.cpp"]
    sources.append(ROOT / "ggml_kvtc" / "llama" / "llama-kvtc-container.cpp")
    return compiled(folder / "replay", sources, include, "-Werror", "-pthread", "-DKVTC_REPLAY", *CHECKS, link=True)


def test_reader_stands_damage(tmp_path):
    seeds.main(tmp_path / "seeds")
    whole = [path.read_bytes() for path in sorted((tmp_path / "seeds").iterdir())]
    rng = random.Random(0)
    inputs = whole + [states.damaged(rng.choice(whole), rng) for _ in range(N - len(whole))]
    data = b"".join(struct.pack("<I", len(each)) + each for each in inputs)
    done = subprocess.run([replayer(tmp_path)], input=data, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{N} inputs\n".encode()), done.stderr.decode()
