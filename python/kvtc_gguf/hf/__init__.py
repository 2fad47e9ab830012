"""kvtc in Hugging Face transformers, for evaluation: `KVTCCache`. Needs the `hf` extra."""

from kvtc_gguf.hf.cache import KVTCCache, everywhere

__all__ = ["KVTCCache", "everywhere"]
