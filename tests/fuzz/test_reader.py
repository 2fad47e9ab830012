"""A short run of what `make fuzz` does for ten minutes, without coverage to guide it.

Failures caught: a C++ reader of saved states that crashes on damage, reads other rows with vectors than without, or
takes a block that its own encoder would not write.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import seeds
import states
from kvtc_gguf import libraries

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
N = 20_000  # inputs
# Traps need no library of the sanitizer's, which not every compiler comes with.
CHECKS = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-D_GLIBCXX_ASSERTIONS"]


def replayer(folder: Path) -> Path:
    """The target as a program; needs a C++ compiler, as the build does."""
    tree = next(iter(sorted((ROOT / "build" / "upstream").glob("llama_cpp_python-*/vendor/llama.cpp"))))
    include = [ROOT / "ggml_kvtc", ROOT / "ggml_kvtc" / "llama", tree / "include", tree / "ggml" / "include"]
    sources = [*sorted((ROOT / "ggml_kvtc").glob("kvtc-rows*.cpp")), HERE / "states.cpp"]
    sources.append(ROOT / "ggml_kvtc" / "llama" / "llama-kvtc-container.cpp")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-DKVTC_REPLAY", *CHECKS]
    built = libraries.folder()
    link = [f"-L{built}", "-lggml-base", f"-Wl,-rpath,{built}", "-o", folder / "replay"]
    subprocess.run([*command, *(f"-I{path}" for path in include), *sources, *link], check=True)
    return folder / "replay"


def test_reader_stands_damage(tmp_path):
    seeds.main(tmp_path / "seeds")
    whole = [path.read_bytes() for path in sorted((tmp_path / "seeds").iterdir())]
    rng = random.Random(0)
    inputs = whole + [states.damaged(rng.choice(whole), rng) for _ in range(N - len(whole))]
    data = b"".join(struct.pack("<I", len(each)) + each for each in inputs)
    done = subprocess.run([replayer(tmp_path)], input=data, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{N} inputs\n".encode()), done.stderr.decode()
