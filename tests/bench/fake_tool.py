"""What `fake.py` writes as llama-bench, llama-perplexity, …: prints what these print, by the file behaviour.json.

speeds: tokens a second by type of K, also the types that are known; drift: by how much the machine slows down with
every call; fail: {"tool type": message}; hang: tools that never end; kld; answers: how many of four are right, by type.
"""

import json
import os
import re
import sys
import time

here = os.path.dirname(os.path.abspath(__file__))
tool, words = os.path.basename(__file__), sys.argv[1:]
with open(os.path.join(here, "behaviour.json")) as file:
    do = json.load(file)
if words == ["--version"]:
    print("version: 0.5.0-dev (build 0, commit abc1234)")
    sys.exit(0)


def value(flag, default=""):
    return words[words.index(flag) + 1] if flag in words else default


calls = os.path.join(here, "..", "calls.jsonl")
with open(calls, "a") as file:
    told = [os.path.basename(here), tool, *words, "rotation=" + os.environ.get("LLAMA_ATTN_ROT_DISABLE", "")]
    file.write(json.dumps(told) + "\n")
with open(calls) as file:
    number = len(file.readlines())

kind = value("-ctk")
if tool in do.get("hang", ()):
    time.sleep(60)
if kind not in do["speeds"]:
    print("error: invalid parameter for argument: -ctk", file=sys.stderr)
    sys.exit(1)
if f"{tool} {kind}" in do.get("fail", {}):
    print("loading the model\n0.00.1 E " + do["fail"][f"{tool} {kind}"] + "\nexiting", file=sys.stderr)
    sys.exit(1)


def sizes(tokens):
    mib = tokens / 1024 * {"f16": 22.5, "q8_0": 11.95}.get(kind, 4.22)
    print(f"I llama_kv_cache: size = {mib:7.2f} MiB ({tokens} cells,  30 layers,  1/1 seqs), "
          f"K ({kind}): {mib / 2:7.2f} MiB, V ({value('-ctv')}): {mib / 2:7.2f} MiB", file=sys.stderr)  # fmt: skip
    turned = int(kind.startswith("q") and "LLAMA_ATTN_ROT_DISABLE" not in os.environ)
    print(f"I llama_kv_cache: attn_rot_k = {turned}, n\nI llama_kv_cache: attn_rot_v = {turned}, n", file=sys.stderr)
    if kind.startswith("kvtc"):
        exact = f"({value('--kvtc-sink')} sinks, window {value('--kvtc-window')}, rollback 64, 196 slots)"
        told = f"3.000 bpv, codes {mib:.2f} MiB, exact rows 2.90 MiB {exact}, bases 5.12 MiB"
        print(f"I print_info: {told}", file=sys.stderr)
    print("I sched_reserve:        CPU compute buffer size =    99.38 MiB", file=sys.stderr)


if tool in ("llama-completion", "llama-cli"):
    sizes(int(value("-c")))
elif tool == "llama-bench":
    speed = do["speeds"][kind] / (1 + do.get("drift", 0) * number)
    for prompt, generate in ((int(value("-p")), 0), (0, int(value("-n")))):
        print(json.dumps({"n_prompt": prompt, "n_gen": generate, "n_depth": int(value("-d")),
                          "samples_ts": [speed if prompt else speed / 2], "stddev_ts": 0.0}))  # fmt: skip
elif tool == "llama-perplexity":
    base = value("--kl-divergence-base")
    if "--kl-divergence" not in words:
        with open(base, "w") as file:
            file.write(here)
    elif not os.path.exists(base):
        sys.exit("error: no logits")
    sizes(int(value("-c")))
    print(f"""Mean PPL(Q)                   :  26.792741 ±   1.267660
Mean    KLD:   {do.get("kld", {}).get(kind, 0.04422):.6f} ±   0.000975
99.9%   KLD:   0.754137
Same top p: 86.473 ± 0.535 %""")
else:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.answer({})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                return self.answer({"tokens": list(body["content"].encode())})
            text = bytes(body["prompt"]).decode(errors="replace")
            with open(calls, "a") as file:
                file.write(json.dumps([os.path.basename(here), "completion", kind, len(body["prompt"]), text]) + "\n")
            city = re.findall(r"magic number of (\w+) is$", text)[0]
            number = re.search(rf"magic number of {city} is (\d+)", text)[1]
            Handler.asked += 1
            right = (Handler.asked - 1) % 4 < do.get("answers", {}).get(kind, 4)
            self.answer({"content": f" {number if right else 7}. And so on 12"})

        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    HTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
