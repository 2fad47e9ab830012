"""Text from a model whose KV cache is compressed: ``python generate.py model.gguf "The capital of France is"``."""

import sys

from llama_cpp import Llama

llm = Llama(sys.argv[1], cache_type="kvtc-k2v4", n_ctx=1024, verbose=False)
print(llm(sys.argv[2], max_tokens=32, temperature=0)["choices"][0]["text"])
