"""Failures caught, on a tree of two files: a tree patched twice, by half or not at all, a rebuild of everything after
an edit, a developer's own tree that is written to."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from upstream import prepare, said, tree_hash

HEADER = "ggml/include/ggml.h"


@dataclass
class Small:
    """A tiny sdist with its patch folder, laid out as the real ones."""

    root: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    @property
    def llama_cpp(self) -> Path:
        return self.root / "up" / "small-1" / "vendor" / "llama.cpp"

    def write(self, name: str, body: str) -> None:
        (self.patches / name).write_text(f"Subject: {name}\nReason: a test\n\n{body}", encoding="utf-8")
        with (self.patches / "series").open("a") as file:
            file.write(f"{name}\n")

    def prepare(self, **variables: Path | str) -> subprocess.CompletedProcess[str]:
        given = {"KVTC_UPSTREAM_SDIST": self.root / "small-1.tar.gz", "KVTC_PATCH_DIR": self.patches, **variables}
        return prepare(self.root / "up", **given)


MARK = f"--- a/{HEADER}\n+++ b/{HEADER}\n@@ -1,3 +1,4 @@\n one\n+GGML_TYPE_KVTC1\n two\n three\n"
NEW = "--- /dev/null\n+++ b/src/new.h\n@@ -0,0 +1 @@\n+int new_file;\n"
OTHER = "--- a/src/other.c\n+++ b/src/other.c\n@@ -1 +1,2 @@\n int other;\n+int added;\n"


@pytest.fixture
def small(tmp_path: Path) -> Small:
    files = {
        HEADER: "one\ntwo\nthree\n",
        "src/other.c": "int other;\n",
        ".git": "gitdir: ../../.git/modules/vendor/llama.cpp\n",
    }
    with tarfile.open(tmp_path / "small-1.tar.gz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"small-1/vendor/llama.cpp/{name}")
            member.size, member.mtime = len(text), 1_000_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    (tmp_path / "patches").mkdir()
    digest = hashlib.sha256((tmp_path / "small-1.tar.gz").read_bytes()).hexdigest()
    lines = ["name: small", "version: 1", "sdist: small-1.tar.gz", f"sha256: {digest}", "llama.cpp: 0", ""]
    (tmp_path / "patches" / "UPSTREAM").write_text("\n".join(lines))
    (tmp_path / "patches" / "series").write_text("# none\n")
    return Small(tmp_path)


def test_patches_reach_a_tree_inside_an_ignored_folder_of_a_repository(small: Small) -> None:
    subprocess.run(["git", "init", "-q", str(small.root)], check=True)
    (small.root / ".gitignore").write_text("up/\n")
    small.write("01.patch", MARK)
    result = small.prepare()
    assert result.returncode == 0, said(result)
    assert "GGML_TYPE_KVTC1" in (small.llama_cpp / HEADER).read_text()
    assert not (small.llama_cpp / ".git").exists()


def test_edited_series_rewrites_only_the_files_that_change(small: Small) -> None:
    small.write("01.patch", MARK)
    small.write("02.patch", NEW)
    assert small.prepare().returncode == 0
    header, new, other = (small.llama_cpp / name for name in (HEADER, "src/new.h", "src/other.c"))
    times = [path.stat().st_mtime_ns for path in (header, other)]
    (small.patches / "02.patch").write_text("Subject: s\nReason: r\n\n" + NEW.replace("new_file", "renamed"))
    result = small.prepare()
    assert result.returncode == 0, said(result)
    assert new.read_text() == "int renamed;\n"
    assert [path.stat().st_mtime_ns for path in (header, other)] == times


def test_patch_taken_out_of_the_series_is_undone(small: Small) -> None:
    assert small.prepare().returncode == 0
    before = tree_hash(small.llama_cpp)
    for name, body in (("01.patch", MARK), ("02.patch", NEW), ("03.patch", OTHER)):
        small.write(name, body)
    assert small.prepare().returncode == 0
    assert tree_hash(small.llama_cpp) != before
    for patch in small.patches.glob("*.patch"):
        patch.unlink()
    (small.patches / "series").write_text("")
    result = small.prepare()
    assert result.returncode == 0, said(result)
    assert tree_hash(small.llama_cpp) == before
    assert (small.llama_cpp / "src/other.c").stat().st_mtime > 1_000_000_000  # or nothing would be rebuilt


@pytest.mark.parametrize("git", ["git", "patch"])
def test_patch_that_does_not_fit_stops_and_leaves_the_tree(small: Small, git: str) -> None:
    small.write("01.patch", MARK)
    assert small.prepare().returncode == 0
    before = tree_hash(small.llama_cpp)
    # One line of context differs: what fuzz would let through.
    small.write(
        "02.patch", f"--- a/{HEADER}\n+++ b/{HEADER}\n@@ -1,4 +1,5 @@\n ONE\n GGML_TYPE_KVTC1\n+x\n two\n three\n"
    )
    result = small.prepare(**({} if git == "git" else {"KVTC_GIT": "OFF"}))
    assert result.returncode != 0
    assert "patches/02.patch does not apply" in said(result)
    assert tree_hash(small.llama_cpp) == before


def test_series_without_the_marker_symbol_stops(small: Small) -> None:
    small.write("01.patch", OTHER)
    result = small.prepare()
    assert result.returncode != 0
    assert "does not name GGML_TYPE_KVTC1" in said(result)


@pytest.mark.parametrize("case", ["unlisted", "missing", "twice"])
def test_series_and_folder_must_agree(small: Small, case: str) -> None:
    small.write("01.patch", MARK)
    if case == "unlisted":
        (small.patches / "stray.patch").write_text(OTHER)
    else:
        with (small.patches / "series").open("a") as file:
            file.write("absent.patch\n" if case == "missing" else "01.patch\n")
    result = small.prepare()
    assert result.returncode != 0
    expected = {"unlisted": "is not listed", "missing": "lists absent.patch", "twice": "lists 01.patch twice"}
    assert expected[case] in said(result)


def test_interrupted_update_is_repaired(small: Small) -> None:
    small.write("01.patch", MARK)
    assert small.prepare().returncode == 0
    after = tree_hash(small.llama_cpp)
    stamp = small.root / "up" / "patched.stamp"
    stamp.write_text("\n".join(["interrupted", *stamp.read_text().splitlines()[1:]]) + "\n")
    (small.llama_cpp / HEADER).write_text("half writ")
    assert small.prepare().returncode == 0
    assert tree_hash(small.llama_cpp) == after


def test_developers_own_tree_is_used_and_never_written(small: Small) -> None:
    own = small.root / "own"
    (own / "ggml" / "include").mkdir(parents=True)
    (own / HEADER).write_text("one\nGGML_TYPE_KVTC1\n")
    small.write("01.patch", MARK)
    before = tree_hash(own)
    result = small.prepare(KVTC_LLAMA_CPP_SOURCE=own)
    assert result.returncode == 0, said(result)
    assert f"llama.cpp in {own}" in said(result)
    assert tree_hash(own) == before
    assert not (small.root / "up").exists()


def test_developers_own_tree_without_our_patches_stops(small: Small) -> None:
    own = small.root / "own"
    (own / "ggml" / "include").mkdir(parents=True)
    (own / HEADER).write_text("one\n")
    small.write("01.patch", MARK)
    result = small.prepare(KVTC_LLAMA_CPP_SOURCE=own)
    assert result.returncode != 0
    assert "the tree is not patched" in said(result)


def test_stock_engine_is_upstreams_tree_and_never_a_patched_one(small: Small) -> None:
    small.write("01.patch", MARK)
    assert small.prepare(KVTC_STOCK="ON").returncode == 0
    assert (small.llama_cpp / HEADER).read_text() == "one\ntwo\nthree\n"
    assert small.prepare().returncode == 0  # now patched
    result = small.prepare(KVTC_STOCK="ON")
    assert result.returncode != 0 and "is patched; KVTC_STOCK needs another KVTC_UPSTREAM_DIR" in said(result)
