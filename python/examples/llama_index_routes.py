"""LlamaIndex over a compressed KV cache: in this process, or through an OpenAI endpoint.

``python llama_index_routes.py model.gguf`` or ``python llama_index_routes.py http://127.0.0.1:8000/v1``, the address of
``llama-server -m model.gguf --cache-type kvtc-k2v4`` or ``python -m llama_cpp.server --cache_type kvtc-k2v4 ...``.
"""

import sys


def local(path: str):
    from llama_index.llms.llama_cpp import LlamaCPP

    options = {"cache_type": "kvtc-k2v4"}  # of llama_cpp.Llama
    return LlamaCPP(
        model_path=path, context_window=1024, max_new_tokens=24, temperature=0, model_kwargs=options, verbose=False
    )


def endpoint(url: str):
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(api_base=url, api_key="none", model="local", max_tokens=24, temperature=0, context_window=1024)


where = sys.argv[1]
llm = (endpoint if "://" in where else local)(where)
print(llm.complete("The capital of France is", formatted=True).text)
