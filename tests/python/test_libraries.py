"""Failures caught: another llama.cpp loaded than was named or is nearest, headers or declarations of one beside the
libraries of another, a search that ends in a traceback."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from kvtc_gguf import libraries
from kvtc_gguf.libraries import HEADERS, NativeError


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A repository, an installed wheel and a build elsewhere, all of them empty."""
    for name in ("KVTC_LIB_DIR", "KVTC_UPSTREAM_DIR"):
        monkeypatch.delenv(name, raising=False)
    wheel = tmp_path / "site-packages" / "llama_cpp"
    monkeypatch.setattr(libraries, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name: SimpleNamespace(origin=str(wheel / "__init__.py")) if wheel.exists() else None,
    )
    return SimpleNamespace(root=tmp_path / "repository", wheel=wheel, elsewhere=tmp_path / "elsewhere")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def build(root: Path, name: str = "build") -> Path:
    """A build tree with libraries and declarations, and the headers of the repository."""
    tree = root / name
    touch(tree / "bin" / "libggml-base.so", tree / "upstream" / "llama_cpp_python-1" / "llama_cpp" / "llama_cpp.py")
    touch(*(root / "ggml_kvtc" / header for header in HEADERS))
    return tree / "bin"


def install(wheel: Path) -> Path:
    """A wheel of ours."""
    touch(wheel / "lib" / "libggml-base.so", wheel / "llama_cpp.py")
    touch(*(wheel / "include" / Path(header).name for header in HEADERS))
    return wheel / "lib"


def test_repository_goes_before_the_wheel(world) -> None:
    install(world.wheel)
    assert libraries.folder() == world.wheel / "lib"
    build(world.root)
    assert libraries.folder() == world.root / "build" / "bin"


def test_what_is_named_is_taken_and_nothing_else(world, monkeypatch) -> None:
    build(world.root), install(world.wheel)
    monkeypatch.setenv("KVTC_LIB_DIR", str(world.elsewhere))
    with pytest.raises(NativeError, match=f"KVTC_LIB_DIR={world.elsewhere}: holds no llama.cpp"):
        libraries.folder()
    touch(world.elsewhere / "libggml-base.so")
    assert libraries.folder() == world.elsewhere
    monkeypatch.setenv("KVTC_UPSTREAM_DIR", str(world.elsewhere))
    with pytest.raises(NativeError, match="KVTC_UPSTREAM_DIR=.*: holds no llama_cpp/llama_cpp.py"):
        libraries.bindings(world.root / "build" / "bin")


def test_headers_and_declarations_belong_to_the_libraries(world) -> None:
    built, cuda, installed = build(world.root), build(world.root, "build-cuda"), install(world.wheel)
    for folder in (built, cuda):
        assert libraries.bindings(folder).parents[1] == folder.parent / "upstream"
        assert libraries.headers(folder) == [world.root / "ggml_kvtc" / header for header in HEADERS]
    assert libraries.bindings(installed) == world.wheel
    assert {path.parent for path in libraries.headers(installed)} == {world.wheel / "include"}


def test_sanitized_libraries_take_the_build_trees_declarations(world) -> None:
    built = build(world.root)
    touch(world.root / "build-asan" / "bin" / "libggml-base.so")
    assert libraries.bindings(world.root / "build-asan" / "bin") == libraries.bindings(built)


def test_what_is_missing_is_said_in_one_line(world) -> None:
    for search in (libraries.folder, partial(libraries.headers, world.root), partial(libraries.bindings, world.root)):
        with pytest.raises(NativeError, match="make build") as caught:
            search()
        assert "\n" not in str(caught.value)
