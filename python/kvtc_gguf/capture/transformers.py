"""Capture through Hugging Face transformers: the checkpoint that a GGUF was made from, on CPU or CUDA.

Queries and keys are taken where the model hands them to its own rotary function (`apply_rotary_pos_emb` and its kin),
so they are before RoPE and after QK-norm whatever the kind of RoPE; and where it hands them to attention, after RoPE.
Channels come in the order of the GGUF (`channels`). Serves every architecture that attends through transformers'
attention interface.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from kvtc_gguf.capture import Capture, Consumer, LayerSample, channels
from kvtc_gguf.layout import FormatError
from kvtc_gguf.model_info import ModelInfo

NAME = "kvtc_capture"
PROBE = 16  # tokens that are enough to see which channels RoPE pairs


class TransformersCapture(Capture):
    """A checkpoint in transformers that runs for the GGUF `info` is of. Use as a context manager.

    checkpoint: a folder, the id of a hub's model, or a GGUF that transformers reads. dtype: "auto" is the checkpoint's.
    Raises FormatError, one line, where it cannot be loaded, is not captured this way, or is not what the GGUF was made
    from.
    """

    def __init__(
        self, checkpoint: str, info: ModelInfo, device: str = "cpu", dtype: str = "auto", threads: int = 0
    ) -> None:
        self.checkpoint, self.info = checkpoint, info
        if threads:
            torch.set_num_threads(threads)
        self._consumer: Consumer | None = None
        self._inputs: list[Tensor] = []  # what the rotary functions were given since the layer's attention started
        self._order: np.ndarray | None = None
        where, options = checkpoint, {}
        if checkpoint.endswith(".gguf"):
            where, options = str(Path(checkpoint).parent), {"gguf_file": Path(checkpoint).name}
        transformers.AttentionInterface.register(NAME, self._attend)
        transformers.AttentionMaskInterface.register(NAME, eager_mask)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, device_map=device, attn_implementation=NAME, **options
            ).eval()
        # the library answers with anything from OSError to ImportError and KeyError
        except Exception as error:
            raise FormatError(f"{checkpoint}: transformers cannot load this checkpoint: {error}") from error
        self.device = device
        self._parameters = inspect.signature(inspect.unwrap(type(self.model).forward)).parameters
        self._past = "cache" if "cache" in self._parameters else "past_key_values"  # the library renames it
        bos = self.tokenizer.bos_token_id
        self.bos = -1 if bos is None else int(bos)
        self.add_bos = self.bos >= 0 and self.tokenizer("a").input_ids[:1] == [self.bos]
        ends = self.model.generation_config.eos_token_id
        self._ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._hooks = ExitStack()
        self._hook_attention()
        self.interleaved = self._match_channels()

    def __enter__(self) -> TransformersCapture:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hooks.close()
        del self.model

    def tokenize(self, text: str) -> np.ndarray:
        """Tokens i32 [n] of a text, without BOS; special tokens are not parsed."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return np.array(ids, np.int32)

    def run(self, tokens: np.ndarray, consumer: Consumer) -> None:
        """Runs one chunk i32 [T] from position 0 and hands every layer's sample to consumer."""
        self._consumer, self._samples = consumer, 0
        try:
            self._forward(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
        finally:
            self._consumer = None
        if not self._samples:
            raise FormatError(f"{self.checkpoint}: attends past transformers' attention interface: {self._instead()}")

    def chat(self, question: str) -> np.ndarray | None:
        """See `Capture`."""
        if not self.tokenizer.chat_template:
            return None
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return np.array(self.tokenizer(text, add_special_tokens=False).input_ids, np.int32)

    def steps(self, texts: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """See `Capture`."""
        past = None
        for position in range(texts.shape[1] - 1):
            ids = torch.from_numpy(texts[:, position : position + 1].astype(np.int64))
            answer = self._forward(ids, use_cache=True, **{self._past: past})
            past = answer.past_key_values
            yield position, answer.logits[:, -1].float().cpu().numpy()

    def ends(self, tokens: np.ndarray) -> np.ndarray:
        """See `Capture`."""
        return np.isin(tokens, self._ends)

    def _forward(self, ids: Tensor, **options: Any) -> Any:
        if "logits_to_keep" in self._parameters:
            options["logits_to_keep"] = 1
        try:
            with torch.inference_mode():
                return self.model(input_ids=ids.to(self.device), **options)
        except torch.OutOfMemoryError as error:
            raise FormatError(f"{self.checkpoint}: out of memory on {self.device}; use a smaller -c") from error

    def _instead(self) -> str:
        return f"calibrate the GGUF itself, without --hf: python -m kvtc_gguf.calibrate {self.info.path}"

    # What the hooks see

    def _hook_attention(self) -> None:
        """Watches where every layer's attention starts, and the rotary functions in the files that define it."""
        spaces: dict[int, dict[str, Any]] = {}
        for module in self.model.modules():
            if hasattr(module, "layer_idx") and "Attention" in type(module).__name__:
                handle = module.register_forward_pre_hook(lambda *_: self._inputs.clear())
                self._hooks.callback(handle.remove)
                space = inspect.unwrap(type(module).forward).__globals__  # of the file that the model is defined in
                spaces[id(space)] = space
        for space in spaces.values():
            for name in [n for n in space if n.startswith("apply_") and "rotary" in n and callable(space[n])]:
                original = space[name]
                self._hooks.callback(space.__setitem__, name, original)
                space[name] = self._watched(original)
        if not spaces:
            raise FormatError(f"{self.checkpoint}: has no attention layers that transformers shows: {self._instead()}")

    def _watched(self, function: Callable) -> Callable:
        def watched(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if self._consumer:
                given = [a for a in (*arguments, *options.values()) if isinstance(a, Tensor)]
                self._inputs += given[: len(result) if isinstance(result, tuple) else 1]
            return result

        return watched

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function of every layer: hands the layer on, then attends as the model does."""
        if self._consumer and query.shape[0] == 1:
            scaling = options.get("scaling") or getattr(module, "scaling", None) or query.shape[-1] ** -0.5
            window = options.get("sliding_window") or 0
            self._take(module, query, key, value, float(scaling), int(window))
        space = inspect.unwrap(type(module).forward).__globals__  # of the file that the model is defined in
        special = options.get("softcap") is not None or options.get("s_aux") is not None
        attend = space["eager_attention_forward"] if special else sdpa_attention_forward
        return attend(module, query, key, value, attention_mask, **options)

    def _take(self, module: nn.Module, q_rope: Tensor, k_rope: Tensor, v: Tensor, scale: float, window: int) -> None:
        q, k = self._unrotated(q_rope, k_rope)
        arrays = [x[0].transpose(0, 1).float().cpu().numpy() for x in (q, k, v, q_rope, k_rope)]
        if self._order is not None:
            arrays = [x if i == 2 else np.ascontiguousarray(x[..., self._order]) for i, x in enumerate(arrays)]
        arrays[3] = arrays[3] * np.float32(scale)  # not in place: it may be the model's own
        self._samples += 1
        assert self._consumer
        self._consumer(LayerSample(int(module.layer_idx), *arrays, window=window))

    def _unrotated(self, q_rope: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """q and k before RoPE, [1, heads, T, d], from what the rotary functions were given since the layer began.

        A layer that called none has no RoPE. A function that was given the first channels only leaves the others alone.
        """
        if not self._inputs:
            return q_rope, k_rope
        plain = []
        for rotated, given in zip((q_rope, k_rope), self._inputs, strict=False):
            if given.shape[1] != rotated.shape[1]:
                given = given.transpose(1, 2)
            if given.shape[:3] != rotated.shape[:3]:
                raise FormatError(f"{self.checkpoint}: rotates keys of a shape unlike attention's: {self._instead()}")
            plain.append(torch.cat([given, rotated[..., given.shape[-1] :]], dim=-1))
        if len(plain) != 2:
            raise FormatError(f"{self.checkpoint}: rotates queries or keys alone: {self._instead()}")
        return plain[0], plain[1]

    # Which channel of the GGUF is which

    def _match_channels(self) -> bool:
        """Finds the order of channels that makes the key weights those of the GGUF; True: interleaved there.

        Raises FormatError if no order does.
        """
        samples: list[LayerSample] = []
        self.run(np.arange(PROBE, dtype=np.int32), samples.append)
        paired = ((s, channels.pairing(s.k, s.k_rope, self._rotated(s))) for s in samples)
        sample, interleaved = next(((s, pairs) for s, pairs in paired if pairs is not None), (samples[0], False))
        shape = (sample.q.shape[1], *sample.k.shape[1:])
        weights = [self._key_weight(sample.layer), channels.gguf_weight(self.info.tensors, sample.layer)]
        for where, weight in zip((self.checkpoint, self.info.path), weights, strict=True):
            if weight is None:
                raise FormatError(
                    f"{where}: layer {sample.layer} has no key weights to compare, so nothing says whether the GGUF is "
                    f"made from the checkpoint: {self._instead()}"
                )
        try:
            rows = [channels.key_rows(weight, *shape) for weight in weights]
            self._order, result = channels.match(*rows, shape[1], self._rotated(sample), interleaved)
        except FormatError as error:
            raise FormatError(f"{self.info.path}: {error}") from error
        return result

    def _rotated(self, sample: LayerSample) -> int:
        return int(self.info.rotated or sample.k.shape[2])

    def _key_weight(self, layer: int) -> np.ndarray | None:
        for module in self.model.modules():
            if getattr(module, "layer_idx", None) == layer:
                for name in ("k_proj", "qkv_proj", "query_key_value"):
                    if isinstance(getattr(module, name, None), nn.Linear):
                        return getattr(module, name).weight.detach().float().cpu().numpy()
        return None
