"""What a KVTCCache needs of a model and its GGUF: the calibration, the order of channels, the cos and sin of tokens."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from torch import nn

from kvtc_gguf import format as calibration_file
from kvtc_gguf.capture import channels
from kvtc_gguf.fingerprint import fingerprint
from kvtc_gguf.format import Calibration
from kvtc_gguf.hf import attention
from kvtc_gguf.hf.codec import SideCodec
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo
from kvtc_gguf.sidecar import locate

Codecs = tuple[SideCodec, SideCodec]
# Of models and of their layers; the library renames it.
CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value")


def prepare(model: nn.Module, gguf: Path, sidecar: Path | None, cache_type: str) -> list[Codecs]:
    """The codecs of every layer, on the devices of its weights. Raises FormatError."""
    sides = re.fullmatch(r"kvtc(?:-k)?(\d)(?:v(\d))?", cache_type.lower())
    if not sides:
        raise FormatError(f"cache_type takes kvtc-k<a>v<b> or kvtc<a>, not {cache_type!r}")
    bits = {"k": int(sides[1]), "v": int(sides[2] or sides[1])}
    calibration = read_calibration(gguf, sidecar)
    if wrong := sorted(set(bits.values()) - set(calibration.bits)):
        raise FormatError(f"the calibration serves kvtc{calibration.bits}, not kvtc{wrong[0]}")
    layers = dict(attention_layers(model))
    if sorted(layers) != sorted(calibration.layers):
        raise FormatError(f"the calibration has {len(calibration.layers)} layers, the model attends in {len(layers)}")
    order = channel_order(layers, calibration, ModelInfo(gguf))
    result = []
    for n, module in sorted(layers.items()):
        device, codecs = next(module.parameters()).device, []
        for side in ("k", "v"):
            kept = calibration.kept_bits(n, side, bits[side])
            own = calibration.layers[n][side]
            codecs.append(SideCodec(own, calibration.bits.index(kept), kept, device, order if side == "k" else None))
        result.append((codecs[0], codecs[1]))
    return result


def read_calibration(gguf: Path, sidecar: Path | None) -> Calibration:
    """The calibration of a GGUF: the one named, else in its metadata, else the file beside it. Raises FormatError."""
    own = fingerprint(gguf)
    if sidecar is None:
        sidecar = locate(gguf)
    if not sidecar.exists():
        raise FormatError(f"{sidecar}: no calibration; run `python -m kvtc_gguf.calibrate {gguf}`")
    calibration = calibration_file.read(sidecar)
    if calibration.fingerprint != own:
        raise FormatError(f"{sidecar}: belongs to another model ({calibration.fingerprint}, {gguf} is {own})")
    return calibration


def attention_layers(model: nn.Module) -> list[tuple[int, nn.Module]]:
    """(layer, attention module) in order."""
    modules = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    return sorted(((int(m.layer_idx), m) for m in modules), key=lambda entry: entry[0])


def channel_order(layers: dict[int, nn.Module], calibration: Calibration, info: ModelInfo) -> Any:
    """Channels i64 [d] of the checkpoint's keys as the GGUF has them. Raises FormatError if that is of another one."""
    n = min(layers)
    side, space = calibration.layers[n]["k"], inspect.unwrap(type(layers[n]).forward).__globals__
    own, theirs = getattr(layers[n], "k_proj", None), channels.gguf_weight(info.tensors, n)
    if "rotate_half" not in space or not isinstance(own, nn.Linear) or theirs is None:
        raise FormatError(f"kvtc_gguf.hf does not serve {type(layers[n]).__name__}: no k_proj turned by rotate_half")
    weight = own.weight.detach().float().cpu().numpy()
    theirs = channels.key_rows(theirs, (len(theirs) - 2 * len(weight)) // side.head_dim, side.n_head, side.head_dim)
    rotated = int(info.rotated or side.head_dim)
    return channels.match(weight, theirs, side.n_head, rotated, interleaved=False)[0]


def watch(model: nn.Module) -> None:
    """Attend by `attention.attend`, and hand each layer of a KVTCCache the cos and sin of the tokens it will get."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    for n, module in attention_layers(model):
        if not hasattr(module, "kvtc_watched"):
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)
            module.kvtc_watched = n


def _hand_over(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    cache = next((options[k] for k in CACHE_ARGUMENTS if options.get(k) is not None), None)
    # other caches may make their layers as they are filled
    for layer in getattr(cache, "layers", [])[module.layer_idx : module.layer_idx + 1]:
        if hasattr(layer, "rotation"):
            given = options.get("position_embeddings") or next((a for a in arguments if isinstance(a, tuple)), None)
            layer.rotation = None if given is None else (given[0], given[1])


def cache_argument(model: nn.Module) -> str:
    """What the model's forward calls its cache, which differs between versions of the library."""
    return (
        "cache" if "cache" in inspect.signature(inspect.unwrap(type(model).forward)).parameters else "past_key_values"
    )
