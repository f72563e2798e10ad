#!/usr/bin/env python3
"""nanogpt's forward pass and nanochat's own, on the same CPU in one run.

    tools/bench_cpu.py BENCH_CPU CHECKPOINT_DIR NANOCHAT_CHECKOUT [threads]

A development tool: needs PyTorch and a checkout of nanochat (its gpt.py is imported as it is; float32, SDPA,
its KVCache). BENCH_CPU is the program made of tools/bench_cpu.cpp. The two take turns, three times; what is
printed are medians.
"""
import json
import os
import statistics
import subprocess
import sys
import time

bench, folder, checkout = sys.argv[1:4]
threads = int(sys.argv[4]) if len(sys.argv) > 4 else os.cpu_count()
os.environ["NANOCHAT_DTYPE"] = "float32"
os.environ["OMP_NUM_THREADS"] = str(threads)
sys.path.insert(0, checkout)

import torch  # noqa: E402

torch.set_num_threads(threads)
from nanochat.engine import KVCache  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402

step = max(f for f in os.listdir(folder) if f.startswith("meta_"))[5:-5]
config = json.load(open(os.path.join(folder, f"meta_{step}.json")))["model_config"]
with torch.device("meta"):
    model = GPT(GPTConfig(**config))
model.to_empty(device="cpu")
model.init_weights()
state = torch.load(os.path.join(folder, f"model_{step}.pt"), weights_only=True)
model.load_state_dict({k: v.float() for k, v in state.items()}, strict=True, assign=True)
model.eval()
prompt = torch.tensor([[i * 7919 % config["vocab_size"] for i in range(512)]])


def cache():
    c = model.config
    return KVCache(1, c.n_kv_head, 1024, c.n_embd // c.n_head, c.n_layer, "cpu", torch.float32)


@torch.inference_mode()
def peer():
    prefill, decode = [], []
    for i in range(4):
        kv = cache()
        start = time.perf_counter()
        model.forward(prompt, kv_cache=kv)
        if i:
            prefill.append(time.perf_counter() - start)
    kv = cache()
    model.forward(prompt[:, :64], kv_cache=kv)
    for i in range(32):
        start = time.perf_counter()
        model.forward(prompt[:, i:i + 1], kv_cache=kv)
        if i >= 8:
            decode.append(time.perf_counter() - start)
    return statistics.median(prefill), statistics.median(decode)


def ours(dtype):
    out = subprocess.run([bench, folder, str(threads), dtype], capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


rounds = [(peer(), ours("float32"), ours("bfloat16")) for _ in range(3)]
med = statistics.median
peer_prefill, peer_decode = (med(r[0][i] for r in rounds) for i in (0, 1))
print(f"{threads} threads, PyTorch {torch.__version__}, {folder}")
print("| | decode ms/token | GB/s | of the read bandwidth | x PyTorch | prefill 512 ms | x PyTorch |")
print("|---|---|---|---|---|---|---|")
size = rounds[0][1]["bytes"]
print(f"| nanochat, PyTorch float32 | {peer_decode * 1e3:.1f} | {size / peer_decode * 1e-9:.1f} | | 1 | {peer_prefill * 1e3:.0f} | 1 |")
for i, dtype in ((1, "float32"), (2, "bfloat16")):
    token, share, fill = (med(r[i][k] for r in rounds) for k in ("token_s", "share", "prefill_s"))
    print(f"| nanogpt, {dtype} | {token * 1e3:.1f} | {rounds[0][i]['bytes'] / token * 1e-9:.1f} | {share:.2f} | "
          f"{peer_decode / token:.2f} | {fill * 1e3:.0f} | {peer_prefill / fill:.2f} |")
