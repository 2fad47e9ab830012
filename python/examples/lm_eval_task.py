"""lm-eval over a compressed KV cache: ``python lm_eval_task.py model.gguf`` runs `lm_eval_tasks/kvtc_reading.yaml`.

``--cache-type f16`` names another cache type, ``--limit 4`` takes the first documents alone. ``--transformers`` runs
the checkpoint that transformers reads from the GGUF, with kvtc_gguf's cache, instead of llama-cpp-python. Any task of
lm-eval's can take the place of ours.
"""

import argparse
from contextlib import closing, nullcontext
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).resolve().parent / "lm_eval_tasks"


class LlamaCpp(TemplateLM):
    """lm-eval's view of a `llama_cpp.Llama`, which must have been made with ``logits_all=True``."""

    def __init__(self, llm) -> None:
        super().__init__()
        self.llm = llm

    @property
    def eot_token_id(self) -> int:
        return self.llm.token_eos()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.llm.tokenize(string.encode(), add_bos=add_special_tokens is not False)

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log probability of a continuation, and whether greedy decoding would give it."""
        tokens = context + continuation
        next(self.llm.generate(tokens[:-1], temp=0))  # evaluates what differs from the tokens before
        logprobs = self.llm.logits_to_logprobs(self.llm.scores[len(context) - 1 : len(tokens) - 1])
        own = logprobs[range(len(continuation)), continuation]
        return float(own.sum()), bool((own == logprobs.max(axis=1)).all())

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        return [self.score(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests, **_) -> list[float]:
        texts = (request.args[0] for request in requests)
        return [self.score([self.prefix_token_id], self.tok_encode(text, False))[0] for text in texts]

    def generate_until(self, requests, **_) -> list[str]:
        answers = []
        for prompt, options in (request.args for request in requests):
            limit, stop = options.get("max_gen_toks", 64), options.get("until", [])
            answers.append(self.llm(prompt, max_tokens=limit, stop=stop, temperature=0)["choices"][0]["text"])
        return answers


def local(path: Path, cache_type: str):
    from llama_cpp import Llama

    llm = Llama(str(path), cache_type=cache_type, n_ctx=1024, logits_all=True, verbose=False)
    return LlamaCpp(llm), closing(llm)


def checkpoint(path: Path, cache_type: str):
    import torch
    from kvtc_gguf.hf import KVTCCache, everywhere
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = cache_type == "f16"  # transformers' own cache, f32 here
    cache = nullcontext() if plain else everywhere(KVTCCache(model, path, cache_type=cache_type), model)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), cache


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--cache-type", default="kvtc-k2v4")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--transformers", action="store_true")
    words = parser.parse_args()
    lm, cache = (checkpoint if words.transformers else local)(words.model, words.cache_type)
    with cache:
        manager = TaskManager(include_path=TASKS)
        found = simple_evaluate(lm, tasks=["kvtc_reading"], task_manager=manager, limit=words.limit, bootstrap_iters=0)
    for document in found["samples"]["kvtc_reading"]:
        scores = [f"{choice[0][0]:.3f}" for choice in document["resps"]]
        print(document["doc"]["question"], *scores)
    print(f"accuracy {found['results']['kvtc_reading']['acc,none']:.3f}")
