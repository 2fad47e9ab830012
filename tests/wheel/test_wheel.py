"""A wheel that a user cannot install and run fails here. Slow: `make wheel-test` builds the wheels and runs this.

They are installed into an empty environment, with what they ask for from the package index and nothing else: a CUDA
wheel (KVTC_WHEELS=dist/cuda) asks for CUDA's libraries too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tools

DIST = Path(os.environ.get("KVTC_WHEELS") or tools.ROOT / "dist").resolve()
MODEL = tools.ROOT / "build" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LARGEST = {False: 40 * 2**20, True: 600 * 2**20}  # bytes of a wheel, by whether it has the CUDA kernels
TOOLS = ("llama-server", "llama-cli", "llama-bench", "llama-perplexity")
SCRIPT = """
from llama_cpp import Llama
llm = Llama("embedded.gguf", cache_type="kvtc-k2v4", verbose=False{more})
out = llm("The three most important ideas in data compression are", max_tokens=24, temperature=0)
print(out["choices"][0]["text"])
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels() -> list[Path]:
    found = sorted(DIST.glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in found] == ["kvtc_gguf", "llama_cpp_python"], "run `make wheel`"
    return found


@pytest.fixture(scope="module")
def home(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheels."""
    home = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    run(home, "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wheels)
    return home


def cuda(wheel: Path) -> int:
    """The version of CUDA that a wheel needs; 0 for a wheel of the CPU."""
    with zipfile.ZipFile(wheel) as archive:
        kernels = [archive.read(name) for name in archive.namelist() if name.endswith("libggml-cuda.so")]
    return max(
        (int(major) for code in kernels for major in re.findall(rb"libcudart[^/\0]*\.so\.(\d+)", code)), default=0
    )


def run(home: Path, program: str, *arguments: object, cwd: Path | None = None) -> str:
    """What a program of the environment prints; nothing of this repository is on its paths."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "KVTC_", "PYTHON"))}
    command = [str(home / "bin" / program), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd or home, env=clean)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_wheel_holds_every_library_once_and_what_upstreams_holds(wheels) -> None:
    with zipfile.ZipFile(wheels[1]) as archive:
        names = [info.filename for info in archive.infolist()]
        sums = [info.CRC for info in archive.infolist() if re.search(r"\.(so|dylib|dll)\b", info.filename)]
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert len(sums) == len(set(sums)) >= 6
    assert re.match(r"llama_cpp_python-0\.3\.36\+kvtc\.\d+-py3-none-", wheels[1].name)
    assert wheels[1].stat().st_size < LARGEST[bool(cuda(wheels[1]))]
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not re.search(r"^llama_cpp$|\.(dist-info|libs)$", t)} == set()
    assert "Requires-Dist: diskcache" in metadata and "Andrei Betlen" in metadata
    asked = re.findall(r"(?m)^Requires-Dist: (nvidia-[a-z-]+)~=(\d+)\.\d+$", metadata)
    version = str(cuda(wheels[1]))
    expected = [(name, version) for name in ("nvidia-cuda-runtime", "nvidia-cublas")]
    assert asked == (expected if int(version) >= 13 else [])  # PyPI's packages of older ones are not looked for
    assert any("LICENSE" in name for name in names)
    assert {f"llama_cpp/bin/{tool}" for tool in TOOLS} <= set(names)


def test_portable_wheel_brings_openmp_and_no_other_library_of_the_building_machine(wheels) -> None:
    """A libssl in a wheel would never get its security fixes."""
    with zipfile.ZipFile(wheels[1]) as archive:
        brought = [name.split("/")[1] for name in archive.namelist() if re.match(r"[^/]+\.libs/.", name)]
    if "-manylinux" in wheels[1].name:
        assert [re.match(r"lib[a-z]+", name)[0] for name in brought] == ["libgomp"], brought
    else:
        assert not brought and "-linux_" in wheels[1].name


def test_libraries_export_no_part_of_libstdcxx(wheels, tmp_path) -> None:
    """It would take the place of the system's own for all of a process; Python crashed."""
    with zipfile.ZipFile(wheels[1]) as archive:
        paths = [archive.extract(name, tmp_path) for name in archive.namelist() if "/lib/lib" in name]
    assert len(paths) >= 6
    for path in paths:
        symbols = subprocess.run(
            ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
        ).stdout
        own = re.findall(
            r" [TDBR] _Z(?:N[KVr]*|T[IVST])?(?:St|S[absiod])\w*", symbols
        )  # W, V: templates of any program
        assert not own, (path, own[:3])


def test_packages_are_consistent(home) -> None:
    assert "No broken requirements" in run(home, "python", "-m", "pip", "check")


@pytest.fixture(scope="module")
def embedded(home, tmp_path_factory) -> Path:
    """A folder with SmolLM2 and its calibration in one file."""
    folder = tmp_path_factory.mktemp("embedded")
    sidecar = MODEL.with_name(MODEL.name.removesuffix(".gguf") + ".kvtc.gguf")
    assert sidecar.is_file(), "run `make calibration`"
    run(home, "python", "-m", "kvtc_gguf.embed", MODEL, sidecar, "-o", folder / "embedded.gguf")
    return folder


def script(home: Path, folder: Path, more: str = "") -> str:
    """What the five lines print, with more arguments of `Llama`."""
    (folder / "five.py").write_text(SCRIPT.format(more=more))
    return run(home, "python", "five.py", cwd=folder)


def test_five_lines_generate_from_a_model_that_embeds_its_calibration(home, embedded) -> None:
    text = script(home, embedded)
    assert len(re.findall(r"[A-Za-z]{3,}", text)) >= 8, text


def test_layers_for_a_gpu_go_there_or_a_line_says_that_there_is_none(home, wheels, embedded) -> None:
    said = "no CUDA GPU was found" in script(home, embedded, ", n_gpu_layers=-1")
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    assert said == (bool(cuda(wheels[1])) and not has_gpu)


def test_console_scripts_are_the_tools(home) -> None:
    for tool in TOOLS:
        assert "--cache-type" in run(home, tool, "--help"), tool


def test_python_server_comes_with_its_extra(home) -> None:
    run(home, "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "llama_cpp_python[server]")
    text = run(home, "python", "-m", "llama_cpp.server", "--help")
    assert "--kvtc_window" in text and "kvtc-k2v4" in text
    assert "No broken requirements" in run(home, "python", "-m", "pip", "check")


def test_upstreams_tests_that_need_no_download_pass(home, tmp_path) -> None:
    (source,) = (path for path in (tools.ROOT / "build" / "upstream").glob("llama_cpp_python-*") if path.is_dir())
    shutil.copytree(source / "tests", tmp_path / "tests")
    models = Path("vendor/llama.cpp/models")
    shutil.copytree(source / models, tmp_path / models)
    shutil.copy(Path(__file__).with_name("upstream_conftest.py"), tmp_path / "tests" / "conftest.py")
    run(home, "python", "-m", "pip", "install", "--quiet", "pytest", "scipy", "huggingface-hub")
    out = run(home, "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    passed = re.search(r"(\d+) passed", out)
    assert passed and int(passed[1]) >= 8 and "failed" not in out, out
