"""What the tests of the command line tools share: small models with calibrations, runs, and comparisons of runs."""

from __future__ import annotations

import ctypes
import os
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import synthetic
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import Calibration, write
from kvtc_gguf.gguf_io import Reader, Writer

from bench.perplexity import Statistics, parse_statistics

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("KVTC_BIN") or ROOT / "build" / "bin")
LIMIT = 60  # seconds that any run may take; a hang is a failure
ERROR = re.compile(r"^(?:[\d.]+ E +|(?=error|llama_\w+: ))(.*)")  # with or without time and level
# what llama.cpp says on its way out, the reason having been named, and its GGUF parser before that
CONSEQUENCES = re.compile(
    r"^gguf_init|^read: |failed to create_?.?context|encountered an error while trying to fit|unable to create context"
    r"|exiting due to model loading error|invalid parameter for argument"
)

N_LAYER, N_HEAD_KV, HEAD_DIM = 2, 2, 32
PROMPT = "The quick brown fox jumps over the lazy dog."
EXACT = ("--kvtc-window", "100000")  # beyond any context here: nothing is read from codes


@dataclass(frozen=True)
class Run:
    """What a tool did. code: exit status, negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def log(self) -> str:
        return self.out + self.err


class Parameters(ctypes.Structure):
    """llama_kvtc_params"""

    _fields_ = [("files", ctypes.c_char_p), ("n_sink", ctypes.c_int32), ("n_window", ctypes.c_int32)]


def set_exact(api: Any, sink: int, window: int) -> None:
    """Exact tokens of the contexts that are made from now on. api: as kvtc_gguf.capture.library loads it, which is once
    for all tests of a process."""
    function = api._lib["llama_kvtc_set_params"]  # another object than anyone else's, so the types are its own
    function.argtypes, function.restype = [Parameters], None
    function(Parameters(None, sink, window))


def run(tool: str, *arguments: object, env: dict[str, str] | None = None) -> Run:
    """Run a tool of build/bin to its end with nothing to read and none of the user's LLAMA_ARG_ variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLAMA_")}
    result = subprocess.run(
        [str(BIN / tool), *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**clean, **(env or {})},
        timeout=LIMIT,
    )
    return Run(result.returncode, result.stdout, result.stderr)


def succeed(tool: str, *arguments: object, env: dict[str, str] | None = None) -> Run:
    result = run(tool, *arguments, env=env)
    assert result.code == 0, result.err
    return result


def complete(model: Path, *arguments: object, n: int = 32, env: dict[str, str] | None = None) -> Run:
    """Greedy completion of PROMPT by `n` tokens; the end of text does not stop it, since random models hit it."""
    fixed = ("-no-cnv", "--temp", 0, "--ignore-eos", "--no-display-prompt", "-t", 1, "-c", 256, "-lv", 4)
    return succeed("llama-completion", "-m", model, "-p", PROMPT, "-n", n, *fixed, *arguments, env=env)


def perplexity(model: Path, text: Path, *arguments: object) -> Run:
    return succeed("llama-perplexity", "-m", model, "-f", text, "-t", 1, "-lv", 4, *arguments)


@dataclass(frozen=True)
class Base:
    """Logits of a model on a text, and comparisons of other runs with them."""

    model: Path
    text: Path
    path: Path
    arguments: tuple[object, ...]

    def save(self, *arguments: object) -> Base:
        perplexity(self.model, self.text, *self.arguments, *arguments, "--kl-divergence-base", self.path)
        return self

    def compare(self, *arguments: object) -> Statistics:
        extra = ("--kl-divergence-base", self.path, "--kl-divergence")
        return parse_statistics(perplexity(self.model, self.text, *self.arguments, *arguments, *extra).log)


def problems(log: str) -> set[str]:
    """The different lines of a log that name an error, without time and level."""
    lines = (match[1].strip() for line in log.splitlines() if (match := ERROR.match(line)))
    return {line for line in lines if not CONSEQUENCES.search(line)}


def write_text(path: Path, n: int = 4000) -> Path:
    """Letters and spaces, the same in every run: a token each for the vocabulary of single bytes."""
    rng = random.Random(0)
    path.write_text("".join(rng.choice("abcdefghijklmnop   ,.") for _ in range(n)))
    return path


def calibration_of(model: Path, n_layer: int = N_LAYER, **options) -> Calibration:
    """A random calibration that names `model`: enough for all but quality."""
    options = {"n_head": N_HEAD_KV, "head_dim": HEAD_DIM, **options}
    return synthetic.calibration(n_layer, fingerprint=fingerprint(model), **options)


def calibrated_model(path: Path, architecture: str = "llama", n_layer: int = N_LAYER, **options) -> Path:
    """A tiny model of an architecture of `synthetic.tiny_model` with its calibration beside it."""
    synthetic.tiny_model(path, architecture, n_layer=n_layer, **options)
    write(calibration_of(path, n_layer), path.with_suffix(".kvtc.gguf"))
    return path


def adapted_model(path: Path, architecture: str, seed: int = 0) -> Path:
    """A tiny model of an architecture that `synthetic.tiny_model` does not know, with its calibration beside it.

    architecture: "maincoder" (normal RoPE, then QK-norm), "talkie" (NeoX RoPE, then QK-norm without weights for keys)
    or "gemma2" (sliding window in every other layer, softcap).
    """
    n_layer = 4 if architecture == "gemma2" else N_LAYER
    plain = path.with_name(f"{path.stem}-llama.gguf")
    synthetic.tiny_model(plain, n_layer=n_layer, seed=seed)
    rng = np.random.default_rng(seed)
    reader = Reader(plain)
    width = int(reader.value("llama.embedding_length", gguf.GGUFValueType.UINT32) or 0)
    heads = int(reader.value("llama.attention.head_count", gguf.GGUFValueType.UINT32) or 0)

    def norm(*shape: int) -> np.ndarray:
        return rng.uniform(0.5, 2, shape).astype(np.float32)

    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    metadata: dict[str, object] = {}
    for n in range(n_layer):
        if architecture == "maincoder":
            tensors |= {f"blk.{n}.attn_{side}_norm.weight": norm(HEAD_DIM) for side in "qk"}
        elif architecture == "talkie":
            tensors[f"blk.{n}.attn_q_norm.weight"] = norm(heads, 1)
            tensors[f"blk.{n}.layer_output_scale.weight"] = norm(1)
        else:
            tensors |= {f"blk.{n}.post_{part}_norm.weight": norm(width) for part in ("attention", "ffw")}
    if architecture == "talkie":
        metadata["logit_scale"] = np.float32(1)
        tensors = {name: t for name, t in tensors.items() if not re.search("attn_norm|ffn_norm|output_norm", name)}
    elif architecture == "gemma2":
        metadata |= {"attention.sliding_window": np.uint32(64), "attn_logit_softcapping": np.float32(50)}
        del tensors["output.weight"]
        tensors["token_embd.weight"] = tensors["token_embd.weight"] / 4

    _write_as(path, architecture, reader, metadata, tensors)
    write(calibration_of(path, n_layer), path.with_suffix(".kvtc.gguf"))
    return path


def mla_model(path: Path) -> None:
    """A tiny deepseek2: keys and values of all heads are kept as one compressed vector a token (MLA)."""
    plain = path.with_name(f"{path.stem}-llama.gguf")
    synthetic.tiny_model(plain, n_head_kv=1, head_dim=96, n_rot=32)
    reader, rng = Reader(plain), np.random.default_rng(0)
    rank, rot, heads, width, own = 64, 32, 4, 128, 32  # own: what a head has besides its rotated part
    shapes = {
        "attn_q": (heads * (own + rot), width),
        "attn_kv_a_mqa": (rank + rot, width),
        "attn_k_b": (heads, rank, own),
        "attn_v_b": (heads, own, rank),
        "attn_output": (width, heads * own),
        "attn_kv_a_norm": (rank,),
    }
    tensors = {t.name: np.array(t.data) for t in reader.tensors if not re.search(r"attn_(q|k|v|output)\.", t.name)}
    for n in range(N_LAYER):
        new = {f"blk.{n}.{name}.weight": rng.standard_normal(shape) / 8 for name, shape in shapes.items()}
        tensors |= {name: array.astype(np.float32) for name, array in new.items()}
    numbers = {
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": rank,
        "attention.key_length_mla": own + rot,
        "attention.value_length_mla": own,
        "leading_dense_block_count": N_LAYER,
        "expert_shared_count": 0,
        "expert_feed_forward_length": 8,
    }
    _write_as(path, "deepseek2", reader, {key: np.uint32(value) for key, value in numbers.items()}, tensors)


def _write_as(path: Path, architecture: str, reader: Reader, metadata: dict[str, object], tensors: dict) -> None:
    """The metadata of a llama under another architecture's name, more of it, and other tensors."""
    writer = Writer(path)
    for key, field in reader.fields.items():
        if key == "general.architecture":
            writer.add(key, architecture)
        elif not key.startswith("GGUF."):
            writer.add_key_value(key.replace("llama.", f"{architecture}.", 1), reader.raw(key), field.types[0])
    for key, value in metadata.items():
        writer.add(f"{architecture}.{key}", value)
    writer.finish([(name, data, None) for name, data in tensors.items()])
