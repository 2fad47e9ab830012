"""Coding vectors in torch: rows byte for byte those of `reference` (numpy) and the C encoder, on any device.

n tokens, H kv heads, d head_dim. Steps are those of `ggml_kvtc/README.md`, "Encoding one head vector".
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvtc_gguf.format import SideCalibration
from kvtc_gguf.layout import GAIN_STEPS, GROUP, row_bytes
from kvtc_gguf.reference import NORM_FLOOR, SCALE_FLOOR
from kvtc_gguf.validate import inverse


class SideCodec:
    """One side of one layer at one budget, its tables on a device.

    order: i64 [d], the channels of a vector as the calibration has them; None: as they come.
    """

    def __init__(
        self, side: SideCalibration, budget_index: int, bits: int, device: torch.device, order: np.ndarray | None = None
    ) -> None:
        self.n_head, self.head_dim, self.device = side.n_head, side.head_dim, device
        self.row_bytes = row_bytes(side.n_head, side.head_dim, bits)
        encode, decode, mean = inverse(side.decode), side.decode.astype(np.float32), side.mean.astype(np.float32)
        if order is not None:  # components of x[..., order] are those of x with the matrix's columns put back
            back = np.argsort(order)
            encode, decode, mean = encode[:, :, back], decode[:, back], mean[:, back]
        floor = SCALE_FLOOR * side.scale.max(axis=1, keepdims=True)
        self.encode_matrix, self.decode_matrix = self._put(encode, torch.float32), self._put(decode, torch.float32)
        self.mean = self._put(mean, torch.float32)
        self.inverse_scale = self._put(np.float32(1) / np.maximum(side.scale, floor), torch.float32)
        self.gain_base = self._put(side.gain_base.astype(np.float64), torch.float64)
        self.keep_norm = self._put(side.gain_rule.astype(bool), torch.bool)
        self._tables(side, budget_index)

    def _put(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(self.device, dtype)

    def _tables(self, side: SideCalibration, budget_index: int) -> None:
        """Codebooks and the midpoints between levels f32 [H * d, L], and where every bit of a row comes from."""
        plans = [side.head_plan(head, budget_index) for head in range(self.n_head)]
        most = max(1, max(1 << int(plan.widths.max(initial=0)) for plan in plans))
        books = np.zeros((self.n_head, self.head_dim, most), np.float32)
        middles = np.full((self.n_head, self.head_dim, max(most - 1, 1)), np.inf, np.float32)
        sources: list[tuple[int, int, int]] = []  # (bit of the row, component, bit of its code)
        for head, plan in enumerate(plans):
            at = 8 * plan.codes_at
            for group, width in enumerate(plan.widths.tolist()):
                book, lanes = plan.codebooks[group], slice(group * GROUP, (group + 1) * GROUP)
                if book is not None:
                    books[head, lanes, : 1 << width] = book
                    middles[head, lanes, : (1 << width) - 1] = (book[:, :-1] + book[:, 1:]) * np.float32(0.5)
                first = head * self.head_dim + group * GROUP
                sources += [(at + lane * width + b, first + lane, b) for lane in range(GROUP) for b in range(width)]
                at += 8 * width
        self.books = self._put(books.reshape(-1, most), torch.float32)
        self.middles = self._put(middles.reshape(len(self.books), -1), torch.float32)
        table = np.array(sources, np.int64).reshape(-1, 3)
        self.bit_at, self.component, self.shift = (self._put(table[:, i], torch.int64) for i in range(3))
        self.gain_at = self._put(np.array([plan.offset for plan in plans]), torch.int64)
        self.weights = self._put(1 << np.arange(8), torch.int32)

    def transform(self, x: Tensor) -> Tensor:
        """z f32 [n, H, d] of keys before RoPE, or values, x [n, H, d]."""
        return torch.einsum("hcd,nhd->nhc", self.encode_matrix, x.float() - self.mean)

    def reconstruct(self, z: Tensor) -> Tensor:
        """x f32 [n, H, d] of z [n, H, d]."""
        return torch.einsum("hdc,nhc->nhd", self.decode_matrix, z.float()) + self.mean

    def encode(self, z: Tensor) -> Tensor:
        """Rows u8 [n, row_bytes] of z f32 [n, H, d]."""
        u = z * self.inverse_scale
        norm = ((u.double() ** 2).sum(2) / self.head_dim).sqrt()
        live = (norm >= NORM_FLOOR) & norm.isfinite()
        y = z * torch.where(live, 1 / torch.where(live, norm, 1.0), 0.0).float()[:, :, None]
        flat = y.reshape(len(z), -1).T.contiguous()
        codes = torch.searchsorted(self.middles, flat)  # [H * d, n]
        levels = self.books.gather(1, codes).T.reshape(z.shape).double()
        codes = codes.T.reshape(z.shape) * live[:, :, None]
        wide = z.double()
        power, dot, own = (wide * wide).sum(2), (wide * levels).sum(2), (levels * levels).sum(2)
        against = torch.where(self.keep_norm, own, dot)
        live &= against > 0
        gain = torch.where(live, power, 0.0) / torch.where(live, against, 1.0)
        gain = torch.where(self.keep_norm, gain.sqrt(), gain)
        live &= gain > 0
        steps = torch.round(GAIN_STEPS * torch.log2(torch.where(live, gain, 1.0) / self.gain_base))
        bits = torch.zeros((len(z), 8 * self.row_bytes), dtype=torch.uint8, device=z.device)
        bits[:, self.bit_at] = ((codes.reshape(len(z), -1)[:, self.component] >> self.shift) & 1).to(torch.uint8)
        rows = (bits.view(len(z), -1, 8) * self.weights).sum(2).to(torch.uint8)
        rows[:, self.gain_at] = torch.where(live, steps.clamp(1, 255), 0.0).to(torch.uint8)
        return rows

    def decode(self, rows: Tensor) -> Tensor:
        """z f32 [n, H, d] of rows u8 [n, row_bytes]."""
        bits = (rows[:, self.bit_at // 8] >> (self.bit_at % 8).to(torch.uint8)) & 1
        codes = torch.zeros((len(rows), self.n_head * self.head_dim), dtype=torch.int64, device=rows.device)
        codes.index_add_(1, self.component, bits.long() << self.shift)
        levels = self.books.gather(1, codes.T).T.reshape(len(rows), self.n_head, self.head_dim)
        code = rows[:, self.gain_at].double()
        gain = torch.where(code > 0, self.gain_base * torch.exp2(code / GAIN_STEPS), 0.0)
        return levels * gain.float()[:, :, None]
