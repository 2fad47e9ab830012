"""LangChain over a compressed KV cache: in this process, or through an OpenAI endpoint.

``python langchain_routes.py model.gguf`` or ``python langchain_routes.py http://127.0.0.1:8000/v1``, the address of
``llama-server -m model.gguf --cache-type kvtc-k2v4`` or ``python -m llama_cpp.server --cache_type kvtc-k2v4 ...``.
"""

import sys

from langchain_core.prompts import PromptTemplate


def local(path: str):
    from langchain_community.llms import LlamaCpp

    options = {"cache_type": "kvtc-k2v4"}  # what LlamaCpp does not know goes to llama_cpp.Llama
    return LlamaCpp(model_path=path, n_ctx=1024, max_tokens=24, temperature=0, verbose=False, model_kwargs=options)


def endpoint(url: str):
    from langchain_openai import OpenAI

    return OpenAI(base_url=url, api_key="none", model="local", max_tokens=24, temperature=0)


where = sys.argv[1]
chain = PromptTemplate.from_template("The capital of {country} is") | (endpoint if "://" in where else local)(where)
print(chain.invoke({"country": "France"}))
