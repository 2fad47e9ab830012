"""Does a calibration hold on other text? ``python -m bench.domains model.gguf -o domains.csv``.

Calibrates on each kind of text of `bench.corpora` and on the default corpus, judges each on the held-out part of each
kind, and prints KLD over that of the calibration made on the same kind (so the diagonal is 1).
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench import corpora
from bench.caches import Cache
from bench.perplexity import Perplexity

DEFAULT = "default"


def calibrated(model: Path, work: Path, tokens: int, threads: int, text: Path | None = None) -> Path:
    """A calibration of a model on a text, else on the default corpus, in the work folder; used again if it is there.

    Raises subprocess.CalledProcessError where calibrating fails.
    """
    file = work / f"{model.stem}-{text.stem if text else DEFAULT}-{tokens}.kvtc.gguf"
    command = [sys.executable, "-m", "kvtc_gguf.calibrate", model, "-o", file, "--tokens", tokens, "-t", threads]
    if not file.exists():
        subprocess.run([str(word) for word in command + (["-f", text] if text else [])], check=True)
    return file


def written(path: Path, kind: str, held_out: bool) -> Path:
    """The file of a text of `bench.corpora`; one that is there stays, as what is installed differs between machines."""
    if not path.exists():
        path.write_text(corpora.text(kind, held_out), encoding="utf-8")
    return path


def main(
    model: Path,
    output: Annotated[Path, typer.Option("-o", "--output", help="CSV of KLDs.")] = Path("domains.csv"),
    binaries: Annotated[Path, typer.Option("--bin")] = Path("build/bin"),
    cache: Annotated[str, typer.Option(help="Cache type.")] = "kvtc-k2v2",
    tokens: Annotated[int, typer.Option(help="Tokens of each calibration.")] = 8192,
    chunks: Annotated[int, typer.Option(help="Chunks of 1024 tokens of each held-out text.")] = 4,
    work: Annotated[Path, typer.Option(help="Folder for texts, calibrations and logits.")] = Path("build/domains"),
    threads: Annotated[int, typer.Option("-t", "--threads")] = os.cpu_count() or 1,
) -> None:
    """Measure the matrix; texts and calibrations that lie in the work folder are used again."""
    work.mkdir(parents=True, exist_ok=True)
    files = {}
    for kind in (*corpora.KINDS, DEFAULT):
        text = None
        if kind != DEFAULT:
            text = written(work / f"{kind}.txt", kind, held_out=False)
        files[kind] = calibrated(model, work, tokens, threads, text)
    rows = []
    for judged in corpora.KINDS:
        text = written(work / f"{judged}-held-out.txt", judged, held_out=True)
        run = Perplexity(binaries / "llama-perplexity", model, text, work / "base.kld", 1024, chunks, threads)
        run.save_base()
        for made, file in files.items():
            with_file = replace(run, more=("--kvtc-file", str(file)))
            rows.append({"calibrated": made, "judged": judged, "kld": with_file.measure(Cache(cache, 4, 128)).kld})
    with output.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["calibrated", "judged", "kld"])
        writer.writeheader()
        writer.writerows(rows)
    kld = {(row["calibrated"], row["judged"]): row["kld"] for row in rows}
    print("| calibrated on | " + " | ".join(corpora.KINDS) + " |\n|---" + "|---" * len(corpora.KINDS) + "|")
    for made in files:
        print(f"| {made} | " + " | ".join(f"{kld[made, j] / kld[j, j]:.2f}" for j in corpora.KINDS) + " |")


if __name__ == "__main__":
    typer.run(main)
