"""Build the wheels: ``python cmake/build_wheel.py dist`` leaves the patched llama-cpp-python's and kvtc_gguf's in dist.

The sdist's own metadata, Python code and build backend make the wheel; its CMake project is replaced by this
repository's, which installs the component "wheel" (cmake/wheel.cmake). Run it with the Python of `make venv`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from wheel_requirements import add_requirements

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path) -> None:
    """Run a command with this environment's tools first on the path; stop where it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = subprocess.run([str(part) for part in command], env={**os.environ, "PATH": path}).returncode
    if code != 0:
        print(f"kvtc: {Path(command[0]).name} failed with code {code}; its own words are above", file=sys.stderr)
        raise typer.Exit(1)


def pip_wheel(source: Path, folder: Path, settings: dict[str, object]) -> Path:
    """The wheel of a source tree, made by the build backend that is installed here."""
    options = [part for name, value in settings.items() for part in ("-C", f"{name}={value}")]
    common = ("-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    run(sys.executable, *common, "--wheel-dir", folder, source, *options)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main(
    out: Path = typer.Argument(..., help="folder for the wheels; older ones of these packages there are removed"),
    sdist: Path | None = typer.Option(None, help="a local copy of the sdist, instead of a download"),
    portable: bool = typer.Option(
        False, help="for any x86-64 with AVX2 instead of this one, without https; a manylinux wheel (CPU)"
    ),
    cuda: bool = typer.Option(False, help="with the CUDA kernels"),
    cuda_architectures: str = typer.Option("", help='compute capabilities to compile them for, "80;90"'),
    jobs: int = typer.Option(0, help="compilers at once; 0: as many as the build tool likes"),
) -> None:
    """Build both wheels."""
    build = ROOT / "-".join(["build-wheel", *(["cuda"] if cuda else []), *(["portable"] if portable else [])])
    upstream = [f"-DKVTC_UPSTREAM_DIR={build / 'upstream'}", f"-DKVTC_PYTHON={sys.executable}"]
    upstream += [f"-DKVTC_UPSTREAM_SDIST={sdist.resolve()}"] if sdist else []
    run("cmake", *upstream, "-P", ROOT / "cmake" / "prepare_upstream.cmake")
    (tree,) = (path for path in (build / "upstream").glob("llama_cpp_python-*") if path.is_dir())
    settings: dict[str, object] = {
        "cmake.source-dir": ROOT,
        "cmake.build-type": "Release",
        "cmake.verbose": "false",
        "cmake.define.KVTC_WHEEL": "ON",
        "cmake.define.KVTC_UPSTREAM_SDIST": sdist.resolve() if sdist else "",
        "cmake.define.KVTC_PYTHON": sys.executable,
        "cmake.define.GGML_NATIVE": "OFF" if portable else "ON",
        "cmake.define.GGML_CUDA": "ON" if cuda else "OFF",
        # A library of the machine that builds does not go with the wheel: its security fixes would not reach it there.
        "cmake.define.LLAMA_OPENSSL": "OFF" if portable else "ON",
        **({"cmake.define.CMAKE_CUDA_ARCHITECTURES": cuda_architectures} if cuda_architectures else {}),
        "install.components": "wheel",
        "build-dir": build,
    }
    os.environ.setdefault("CC", "cc")  # as CMake would choose; scikit-build-core takes those that Python was built with
    os.environ.setdefault("CXX", "c++")
    if jobs:
        os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] = str(jobs)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("llama", "repaired", "kvtc")]
        wheels = [pip_wheel(tree, folders[0], settings)]
        if portable and sys.platform == "linux":
            # CUDA's libraries are of packages of their own and of the user's driver.
            others = [f"--exclude={name}" for name in ("libcuda.so*", "libcudart.so*", "libcublas*.so*")]
            run(sys.executable, "-m", "auditwheel", "repair", *others, "--wheel-dir", folders[1], wheels[0])
            wheels = list(folders[1].glob("*.whl"))
        add_requirements(wheels[0], (build / "wheel-requirements.txt").read_text().split())
        wheels.append(pip_wheel(ROOT, folders[2], {}))
        out.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            package = wheel.name.split("-")[0]
            for old in out.glob(f"{package}-*.whl"):
                old.unlink()
            partial = out / f".{wheel.name}"
            partial.write_bytes(wheel.read_bytes())
            os.replace(partial, out / wheel.name)
            print(f"{out / wheel.name}: {(out / wheel.name).stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    typer.run(main)
