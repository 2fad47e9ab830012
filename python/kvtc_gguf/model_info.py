"""What fitting needs from a model's GGUF itself: its name, RoPE channels, softcap and the output projections W_o."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFValueType, quants

from kvtc_gguf.capture import rope_pairs
from kvtc_gguf.fingerprint import open_model
from kvtc_gguf.layout import FormatError


class ModelInfo:
    """Metadata and W_o of the model in a GGUF (or a set of split ones). Raises FormatError if it is not one."""

    def __init__(self, path: Path) -> None:
        readers = open_model(path)
        self.path, self.reader = path, readers[0]
        self.tensors = {t.name: t for reader in readers for t in reader.tensors}
        self.architecture = self.reader.value("general.architecture", GGUFValueType.STRING)
        if not self.architecture:
            raise FormatError(f"{path}: names no architecture, so it is no model")
        self.block_count = int(self._number("block_count", GGUFValueType.UINT32) or 0)
        self.softcap = float(self._number("attn_logit_softcapping", GGUFValueType.FLOAT32) or 0.0)
        self.rotated = self._number("rope.dimension_count", GGUFValueType.UINT32)

    def pairs(self, head_dim: int, interleaved: bool) -> np.ndarray:
        """RoPE pairs i64 [n, 2] of a head (see `capture.rope_pairs`)."""
        return rope_pairs(head_dim, int(self.rotated or head_dim), interleaved)

    def gram(self, layer: int, n_head: int, d: int) -> np.ndarray:
        """W_o^T W_o of each query head, f32 [n_head, d, d]; identity where the model has no plain output projection."""
        tensor = self.tensors.get(f"blk.{layer}.attn_output.weight")
        identity = np.broadcast_to(np.eye(d, dtype=np.float32), (n_head, d, d))
        if tensor is None or int(tensor.shape[0]) != n_head * d:
            return identity
        try:
            weight = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:  # a type that the gguf package cannot decode
            return identity
        heads = np.asarray(weight, np.float32).reshape(-1, n_head, d).transpose(1, 2, 0)
        return heads @ heads.transpose(0, 2, 1)

    def undecodable(self) -> list[str]:
        """Types of output projections that the gguf package cannot decode: `gram` is the identity for these."""
        types = set()
        for name, tensor in self.tensors.items():
            if name.endswith(".attn_output.weight"):
                try:
                    quants.dequantize(tensor.data[:1], tensor.tensor_type)
                except NotImplementedError:
                    types.add(tensor.tensor_type.name)
        return sorted(types)

    def _number(self, key: str, kind: GGUFValueType) -> int | float | None:
        try:
            return self.reader.value(f"{self.architecture}.{key}", kind)
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from error
