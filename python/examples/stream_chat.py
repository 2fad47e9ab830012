"""A chat whose answers stream: ``python stream_chat.py model.gguf < questions.txt``, a line for each turn."""

import sys

from llama_cpp import Llama

llm = Llama(sys.argv[1], cache_type="kvtc-k2v4", n_ctx=2048, verbose=False)
messages = []
for question in sys.stdin:
    messages.append({"role": "user", "content": question.strip()})
    answer = ""
    for chunk in llm.create_chat_completion(messages, max_tokens=48, temperature=0, stream=True):
        piece = chunk["choices"][0]["delta"].get("content") or ""
        answer += piece
        print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": answer})
