#!/usr/bin/env python3
"""Does nanogpt compute what nanochat computes? Runs one checkpoint through both and compares every
value of the forward pass; where they part, names the first point that differs and the likely cause.

    python3 tools/parity.py --nanogpt build/nanogpt --source sft --model-tag d12
    python3 tools/parity.py --nanogpt build/nanogpt --source base --softcap 20

Needs nanochat (its folder in PYTHONPATH, at the commit that wrote the checkpoint) and what it needs;
of its own only PyTorch and the standard library. Both sides compute in float32 on the CPU. Flags
that are not listed by --help go to nanogpt. Exit code 0: equal, 1: different, 2: could not compare.

Names of points are those of nanogpt.hpp's name(HookPoint, layer). nanochat's values are taken by
hooks on its modules, its norm() and its attention; nothing in it is computed again. It does not show
x0 after the smear and the gate of a value embedding: faults there are seen in resid_pre and v.

Symptom (the first point that differs)             likely cause
  hook_embed                                       other weights, another step; bfloat16 on one side
  ln1, ln2, ln_final, hook_embed_norm              a norm that is missing, or a LayerNorm
  hook_resid_pre, layer 0, not at position 0       the smear
  hook_resid_pre                                   resid_lambdas, x0_lambdas; x0 before the smear
  attn.hook_q, attn.hook_k, hook_attn_out,
  mlp.hook_pre, hook_mlp_out, hook_logits_raw      that weight: damaged, of another step, transposed
  attn.hook_v                                      value embeddings on other layers; factor of the gate
  attn.hook_rot_q, attn.hook_rot_k                 sign of the rotation, base, rounded tables; QK norm; scale
  attn.hook_z, from position 0 on                  heads: which keys and values a query head uses
  attn.hook_z, from position 1 on                  the scale of the scores, or no causal mask
  attn.hook_z, from position N + 1 on              windows of N and of more: off by one, or another pattern
  mlp.hook_post                                    relu^2
  hook_resid_mid, hook_resid_post                  the residual connection
  hook_backout                                     backout_lambda, or another layer as the middle
  hook_logits                                      the soft cap
  any, in its shape                                n_head, n_kv_head; logits: padded vocabulary
  any, by less than 1 %, at all positions          bfloat16 on one side
"""
import argparse
import array
import contextlib
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import tempfile

TOLERANCE = 1e-4  # of a row's length; two orders of summation in float32 differ by 1e-6 to 1e-5
FITS = 1e-3       # a row is what a formula gives
TEXT = """The sky looks blue because air scatters short waves of light more than long ones. At noon the
light comes straight down; in the evening it crosses much more air, and what is left of it is red. """


# ---- traces: name -> (shape, values); the first dimension is the position in the sequence

class Trace(dict):
    def put(self, name, shape, values):
        """Adds a value, or the rows that follow those that are there."""
        if name in self:
            old, before = self[name]
            shape, values = [old[0] + shape[0], *shape[1:]], before + values
        self[name] = (list(shape), values)

    def row(self, name, t):
        shape, values = self[name]
        width = math.prod(shape[1:])
        return values[t * width:(t + 1) * width]

    def heads(self, name, t):
        hd, row = self[name][0][-1], self.row(name, t)
        return [row[i:i + hd] for i in range(0, len(row), hd)]


def read_trace(path):
    """What `nanogpt logits --hooks FILE` writes."""
    trace = Trace()
    with open(path, "rb") as file:
        while line := file.readline():
            head = json.loads(line)
            values = array.array("f")
            values.fromfile(file, math.prod(head["shape"]))
            trace.put(head["name"], head["shape"], values)
    return trace


def length(row):
    return math.dist(row, [0.0] * len(row))


def apart(a, b):
    """Distance of two rows as a share of the second's length; infinite if anything is no number."""
    distance, size = math.dist(a, b), length(b)
    if not (math.isfinite(distance) and math.isfinite(size)):
        return math.inf
    return distance / size if size > 0 else (math.inf if distance > 0 else 0.0)


class Difference:
    """The first row of one value in which two traces differ, and how far apart the worst row is."""

    def __init__(self, name, ours, theirs, tolerance):
        self.name, self.row, self.worst, self.rows = name, None, 0.0, 0
        self.layer = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        self.point = name.split(".", 2)[2] if self.layer >= 0 else name
        self.shapes = ours[name][0], theirs[name][0]
        if self.shapes[0] != self.shapes[1]:
            self.row, self.worst = 0, math.inf
            return
        for t in range(self.shapes[0][0]):
            far = apart(ours.row(name, t), theirs.row(name, t))
            self.worst = max(self.worst, far)
            if not far <= tolerance:
                self.rows += 1
                if self.row is None:
                    self.row, self.far = t, far


def compare(ours, theirs, tolerance=TOLERANCE):
    """A Difference for each value that both have, in the order of the forward pass."""
    return [Difference(name, ours, theirs, tolerance) for name in ours if name in theirs]


# ---- causes: what a value could have been made by; the ways that fit each side are told
# A function below yields (way, row): from values before the point, equal on both sides, what each way
# of computing it would give. A way is a tuple of phrases; those that differ between the sides are told.

def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def normed(x):
    scale = 1 / math.sqrt(dot(x, x) / len(x) + 2.0 ** -23)
    return [scale * v for v in x]


def bf16(x):
    """Rounded to bfloat16, to nearest even."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return struct.unpack("<f", struct.pack("<I", (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000))[0]


def is_bf16(row):
    return all(bf16(x) == x for x in row if math.isfinite(x))


def rotated(x, t, sign, base, rounded):
    half = len(x) // 2
    low, high = [], []
    for j in range(half):
        angle = t * base ** (-2 * j / len(x))
        cos, sin = math.cos(angle), sign * math.sin(angle)
        if rounded:
            cos, sin = bf16(cos), bf16(sin)
        low.append(x[j] * cos - x[half + j] * sin)
        high.append(x[j] * sin + x[half + j] * cos)
    return low + high


def ways_to_rotate(d, trace):
    heads = trace.heads(d.name.replace("rot_", ""), d.row)
    turns = {"rotated by minus the angle": -1, "rotated by plus the angle": 1, "not rotated": 0}
    for (turn, sign), base, table, norm, scale in itertools.product(
            turns.items(), (100000, 10000), ("float32", "bfloat16"), (True, False), (1, 1.15, 1.2)):
        row = []
        for head in heads:
            x = rotated(head, d.row, sign, base, table == "bfloat16")
            row += [scale * v for v in (normed(x) if norm else x)]
        yield (turn, f"rotary base {base} (--rope-base)", f"rotary tables in {table} (--rope-table)",
               "QK norm" if norm else "no QK norm", f"scale {scale} after it (--qk-scale)"), row


def ways_to_attend(d, trace):
    q, hd = trace.heads(d.name.replace("hook_z", "hook_rot_q"), d.row), trace[d.name][0][-1]
    keys = [trace.heads(d.name.replace("hook_z", "hook_rot_k"), s) for s in range(trace[d.name][0][0])]
    values = [trace.heads(d.name.replace("hook_z", "hook_v"), s) for s in range(len(keys))]
    group, kv = len(q) // len(keys[0]), len(keys[0])
    spans = {"a causal mask": (0, d.row + 1), "no causal mask": (0, len(keys))}
    if d.row >= 2:
        spans = {f"a window of more than {d.row - 1} positions (--window-pattern, --short-window)":
                 (0, d.row + 1), f"a window of {d.row - 1} positions": (1, d.row + 1), **spans}
    for (window, (a, b)), shared, scale in itertools.product(
            spans.items(), ("neighbouring", "every n-th"), ("sqrt(hd)", "hd", "1")):
        row = []
        for j, head in enumerate(q):
            i = j // group if shared == "neighbouring" else j % kv
            over = {"sqrt(hd)": math.sqrt(hd), "hd": hd, "1": 1}[scale]
            scores = [dot(head, keys[s][i]) / over for s in range(a, b)]
            if not scores:
                break
            weights = [math.exp(s - max(scores)) for s in scores]
            row += [dot(weights, [values[s][i][c] for s in range(a, b)]) / sum(weights)
                    for c in range(hd)]
        if len(row) == len(q) * hd:
            yield (window, f"{shared} query heads share keys", f"scores over {scale}"), row


def ways_to_value(d, trace):
    block = f"blocks.{d.layer}.attn."
    plain = trace.heads(block + "c_v", d.row)
    yield ("no value embedding in this layer",), sum(map(list, plain), [])
    if block + "ve_gate" in trace:
        gates, embed = trace.row(block + "ve_gate", d.row), trace.row(block + "value_embed", d.row)
        hd = len(plain[0])
        for factor in (3, 2, 1):
            yield (f"a value embedding with a gate of {factor} sigmoid",), [
                v + factor / (1 + math.exp(-gates[i])) * embed[i * hd + j]
                for i, head in enumerate(plain) for j, v in enumerate(head)]


def ways_to_mix(d, trace):
    """resid_pre; hook_smear is nanogpt's, its faults are seen here."""
    plain = trace.row("hook_embed_norm", d.row)
    smeared = {"no smear": plain}
    if "hook_smear" in trace:
        smeared = {"smear": trace.row("hook_smear", d.row), **smeared}
    lambdas = {"no lambdas": (1, 0)}
    if "resid_lambdas" in trace:
        r, x0 = (trace[name][1][d.layer] for name in ("resid_lambdas", "x0_lambdas"))
        lambdas = {"both lambdas": (r, x0), "no x0_lambdas": (r, 0), "no resid_lambdas": (1, x0),
                   **lambdas}
    for (smear, start), (how, (r, x0)), again in itertools.product(
            smeared.items(), lambdas.items(), smeared):
        x = start if d.layer == 0 else trace.row(f"blocks.{d.layer - 1}.hook_resid_post", d.row)
        yield (smear, how, f"x0 with {again}"), [r * a + x0 * b for a, b in zip(x, smeared[again])]


def ways_to_norm(d, trace):
    before = {"hook_embed_norm": "hook_embed", "ln1.hook_normalized": "hook_resid_pre",
              "ln2.hook_normalized": "hook_resid_mid",
              "ln_final.hook_normalized": "hook_backout"}[d.point]
    if before not in trace and d.layer < 0:
        last = max(int(name.split(".")[1]) for name in trace if name.startswith("blocks."))
        before = f"blocks.{last}.hook_resid_post"
    x = list(trace.row(before if d.layer < 0 else f"blocks.{d.layer}.{before}", d.row))
    mean = sum(x) / len(x)
    yield ("RMS norm",), normed(x)
    yield ("no norm",), x
    yield ("LayerNorm",), normed([v - mean for v in x])


def ways_to_square(d, trace):
    x = trace.row(d.name.replace("hook_post", "hook_pre"), d.row)
    for name, f in {"relu^2": lambda v: max(v, 0) ** 2, "relu": lambda v: max(v, 0),
                    "x^2": lambda v: v * v, "GELU": lambda v: v * (1 + math.erf(v / 2 ** 0.5)) / 2,
                    "SiLU": lambda v: v / (1 + math.exp(-v)) if v > -700 else 0}.items():
        yield (name,), [f(v) for v in x]


def ways_to_add(d, trace):
    middle = d.point == "hook_resid_mid"
    block = f"blocks.{d.layer}.hook_"
    x = trace.row(block + ("resid_pre" if middle else "resid_mid"), d.row)
    y = trace.row(block + ("attn_out" if middle else "mlp_out"), d.row)
    yield ("the residual connection",), [a + b for a, b in zip(x, y)]
    yield ("no residual connection",), list(y)
    yield (f"no {'attention' if middle else 'MLP'}",), list(x)


def ways_to_back_out(d, trace):
    posts = [name for name in trace if name.endswith("hook_resid_post")]
    last, factor = trace.row(posts[-1], d.row), trace["backout_lambda"][1][0]
    for i in sorted(range(len(posts)), key=lambda i: i != len(posts) // 2):
        middle = trace.row(posts[i], d.row)
        yield (f"layer {i} taken out",), [a - factor * b for a, b in zip(last, middle)]
    yield ("nothing taken out",), list(last)


def ways_to_cap(d, trace):
    raw = trace.row("hook_logits_raw", d.row)
    for cap in (15, 20, 30, 50, 10):
        yield (f"a soft cap of {cap} (--softcap)",), [cap * math.tanh(v / cap) for v in raw]
    yield ("no soft cap",), list(raw)


WAYS = {
    "attn.hook_rot_q": ways_to_rotate, "attn.hook_rot_k": ways_to_rotate,
    "attn.hook_z": ways_to_attend, "attn.hook_v": ways_to_value, "hook_resid_pre": ways_to_mix,
    "hook_embed_norm": ways_to_norm, "ln1.hook_normalized": ways_to_norm,
    "ln2.hook_normalized": ways_to_norm, "ln_final.hook_normalized": ways_to_norm,
    "mlp.hook_post": ways_to_square, "hook_resid_mid": ways_to_add, "hook_resid_post": ways_to_add,
    "hook_backout": ways_to_back_out, "hook_logits": ways_to_cap}
WEIGHTS = {
    "hook_embed": "transformer.wte", "attn.hook_q": "attn.c_q", "attn.hook_k": "attn.c_k",
    "attn.hook_v": "attn.c_v, value_embeds or attn.ve_gate", "hook_attn_out": "attn.c_proj",
    "mlp.hook_pre": "mlp.c_fc", "hook_mlp_out": "mlp.c_proj", "hook_logits_raw": "lm_head",
    "hook_resid_pre": "resid_lambdas, x0_lambdas or smear", "hook_backout": "backout_lambda"}


def fitting(ways, row):
    """The ways that give this row, as well as any does."""
    fits = [(apart(given, row), way) for way, given in ways]
    best = min((far for far, _ in fits), default=math.inf)
    return [way for far, way in fits if best <= FITS and far <= max(3 * best, 1e-5)]


def cause_of_way(d, ours, theirs):
    both = Trace({**ours, **theirs})  # equal up to here; what only one side shows comes with it
    ways = list(WAYS[d.point](d, both))
    mine, its = fitting(ways, ours.row(d.name, d.row)), fitting(ways, theirs.row(d.name, d.row))
    if mine and its:  # of the pairs that explain it, the one that has to assume least
        a, b = min(itertools.product(its, mine), key=lambda pair: sum(x != y for x, y in zip(*pair)))
        return "; ".join(f"nanochat has {x}, nanogpt {y}" for x, y in zip(a, b) if x != y) or None
    if mine or its:
        known, other = ("nanogpt", "nanochat") if mine else ("nanochat", "nanogpt")
        return f"{known} has {', '.join((mine or its)[0])}; what {other} has is none of the known ways"
    return None


def cause(d, ours, theirs):
    """The likely cause of a difference, one sentence."""
    mine, its = d.shapes
    if mine != its:
        if d.point.startswith("hook_logits"):
            return f"vocabulary: rows that only pad it to {max(mine[1], its[1])} are not cut off"
        return "shape: n_head, n_kv_head or n_embd are not the same"
    a, b = ours.row(d.name, d.row), theirs.row(d.name, d.row)
    for side, row in ("nanogpt", a), ("nanochat", b):
        if not math.isfinite(length(row)):
            return f"{side} has NaN or infinity there, from a damaged weight or too narrow a type"
    rounded = [side for side, row in (("nanogpt", a), ("nanochat", b)) if is_bf16(row)]
    if len(rounded) == 1 and d.far < 0.02:
        return f"{rounded[0]} has bfloat16 there, the other float32 (-d float32; NANOCHAT_DTYPE=float32)"
    if d.point in WAYS and (text := cause_of_way(d, ours, theirs)):
        return text
    far = [abs(x - y) for x, y in zip(a, b)]
    columns = [j for j, x in enumerate(far) if x > max(far) / 100]
    few = len(columns) < len(far) / 4
    if not few and d.worst < 0.02:
        return "one side rounds more, to bfloat16 or tf32 (-d float32; NANOCHAT_DTYPE=float32)"
    weight = WEIGHTS.get(d.point, "what makes this value")
    if d.layer >= 0 and "." in weight.split(",")[0]:
        weight = f"transformer.h.{d.layer}.{weight}"
    only = f"; only {len(columns)} of {len(far)} outputs differ, the first is {columns[0]}" if few else ""
    return f"weights: {weight} is another one, damaged, of another step or transposed{only}"


def report(ours, theirs, tolerance=TOLERANCE):
    """Prints the comparison; True if all is equal."""
    found = compare(ours, theirs, tolerance)
    first = next((d for d in found if d.row is not None), None)
    if not found or found[-1].name != "hook_logits":
        print("nothing to compare: a trace has no hook_logits")
        return False
    if first is None:
        print(f"equal: {len(found)} values of the forward pass; rows differ by at most "
              f"{max(d.worst for d in found):.1e} of their length, logits by {found[-1].worst:.1e}")
        return True
    bad = [d for d in found if d.row is not None]
    print(f"different: {len(bad)} of {len(found)} values, logits by {found[-1].worst:.1e} of their length")
    print(f"first: {first.name}, position {first.row} of {first.shapes[0][0]}, ", end="")
    if first.shapes[0] != first.shapes[1]:
        print(f"nanogpt's shape is {first.shapes[0]}, nanochat's {first.shapes[1]}")
    else:
        print(f"by {first.far:.1e} of its length; {first.rows} positions differ")
    print(f"likely cause: {cause(first, ours, theirs)}")
    return False


# ---- nanochat

def attention_of_january(torch):
    """From 2026-01-11 to 01-16 nanochat had FlashAttention 3 only, from a package for its GPUs. This
    stands in for that package: causal attention over the last window + 1 keys."""
    from types import ModuleType, SimpleNamespace

    def flash_attn_func(q, k, v, causal=True, window_size=(-1, 0)):
        t = torch.arange(q.size(1))
        back = t[:, None] - t[None, :]
        mask = (back >= 0) & ((window_size[0] < 0) | (back <= window_size[0]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
        return y.transpose(1, 2)

    module = ModuleType("kernels")
    interface = SimpleNamespace(flash_attn_func=flash_attn_func)
    module.get_kernel = lambda *_: SimpleNamespace(flash_attn_interface=interface)
    return module


class Watch:
    """Records what a nanochat model computes in one call."""

    def __init__(self, torch, gpt, model):
        self.torch, self.gpt, self.model = torch, gpt, model
        self.trace, self.layer, self.norms = Trace(), 0, 0
        config = model.config
        self.L, self.V, self.D = config.n_layer, config.vocab_size, config.n_embd
        self.hd = config.n_embd // config.n_head

    def put(self, name, tensor, *tail):
        """tensor (1, T, ...) or (T, ...), kept as (T, *tail) float32."""
        import ctypes
        rows = tensor.detach().float().contiguous()
        shape = [rows.numel() // math.prod(tail), *tail]
        values = array.array("f")
        values.frombytes(ctypes.string_at(rows.data_ptr(), rows.numel() * 4))
        self.trace.put(name, shape, values)

    def after(self, module, name, *tail):
        module.register_forward_hook(lambda m, a, out: self.put(name, out, *(tail or out.shape[2:])))

    def before(self, module, name, *tail):
        module.register_forward_pre_hook(
            lambda m, a: self.put(name, a[0], *(tail or a[0].shape[2:])))

    def hook(self):
        model, hd = self.model, self.hd
        self.after(model.transformer.wte, "hook_embed")
        for i, block in enumerate(model.transformer.h):
            attn, mlp, b = block.attn, block.mlp, f"blocks.{i}."
            block.register_forward_pre_hook(lambda m, a, i=i: setattr(self, "layer", i))
            self.before(block, b + "hook_resid_pre")
            self.before(attn, b + "ln1.hook_normalized")
            for letter, module in ("q", attn.c_q), ("k", attn.c_k):
                heads = module.out_features // hd
                self.after(module, f"{b}attn.hook_{letter}", heads, hd)
            self.after(attn.c_v, b + "attn.c_v", attn.c_v.out_features // hd, hd)
            if getattr(attn, "ve_gate", None) is not None:
                self.after(attn.ve_gate, b + "attn.ve_gate")
                self.after(model.value_embeds[str(i)], b + "attn.value_embed")
            self.before(attn.c_proj, b + "attn.hook_z", attn.c_q.out_features // hd, hd)
            self.after(attn, b + "hook_attn_out")
            self.before(mlp, b + "ln2.hook_normalized")
            self.after(mlp.c_fc, b + "mlp.hook_pre")
            self.before(mlp.c_proj, b + "mlp.hook_post")
            self.after(mlp, b + "hook_mlp_out")
            self.after(block, b + "hook_resid_post")
        self.before(model.lm_head, "ln_final.hook_normalized")
        model.lm_head.register_forward_hook(
            lambda m, a, out: self.put("hook_logits_raw", out[..., :self.V], self.V))
        for name in ("resid_lambdas", "x0_lambdas", "backout_lambda"):
            if hasattr(model, name):
                self.put(name, getattr(model, name))

    def norm(self, x):
        """nanochat's norm: once after the embedding, twice in each block, once at the end. Those of the
        heads have one dimension more."""
        y = self.plain_norm(x)
        if x.ndim == 3:
            if self.norms == 0:
                self.put("hook_embed_norm", y, self.D)
            elif self.norms == 2 * self.L + 1 and hasattr(self.model, "backout_lambda"):
                self.put("hook_backout", x, self.D)
            elif self.norms % 2 == 0:
                self.put(f"blocks.{self.layer}.hook_resid_mid", x, self.D)
            self.norms += 1
        return y

    def attend(self, q, k, v, *rest, **named):
        """torch's attention, which all of nanochat's end in on the CPU: (1, heads, T, hd)."""
        for name, x in ("rot_q", q), ("rot_k", k), ("v", v):
            self.put(f"blocks.{self.layer}.attn.hook_{name}", x[0].transpose(0, 1), x.size(1), self.hd)
        return self.plain_attend(q, k, v, *rest, **named)

    def run(self, ids):
        functional = self.torch.nn.functional
        self.plain_norm, self.plain_attend = self.gpt.norm, functional.scaled_dot_product_attention
        self.hook()
        self.gpt.norm, functional.scaled_dot_product_attention = self.norm, self.attend
        try:
            with self.torch.inference_mode():
                logits = self.model(self.torch.tensor([ids]))
        finally:
            self.gpt.norm = self.plain_norm
            functional.scaled_dot_product_attention = self.plain_attend
        self.put("hook_logits", logits, logits.size(-1))
        return self.trace


def give_up(reason):
    print(f"parity: {reason}", file=sys.stderr)
    sys.exit(2)


def nanochat_model(o):
    """(torch, nanochat.gpt, model, tokenizer); on the CPU in float32, whatever else is there."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("NANOCHAT_DTYPE", "float32")
    try:
        import torch
        import nanochat.common
    except ImportError as error:
        give_up(f"{error}. nanochat's folder has to be in PYTHONPATH and PyTorch installed")
    folder = os.path.dirname(nanochat.common.__file__)
    if not os.path.exists(os.path.join(folder, "flash_attention.py")):
        sys.modules["kernels"] = attention_of_january(torch)
    from nanochat import gpt
    from nanochat.checkpoint_manager import load_model
    try:
        model, tokenizer, _ = load_model(o.source, torch.device("cpu"), phase="eval",
                                         model_tag=o.model_tag, step=o.step)
    except Exception as error:  # whatever nanochat raises, the reason is its own
        give_up(f"nanochat cannot load this checkpoint: {type(error).__name__}: {error}\n"
                "It loads what it wrote at the same commit: check that one out.")
    return torch, gpt, model, tokenizer


def ids_to_read(o, model, tokenizer):
    """The text, repeated until it is longer than the shortest window (or --tokens)."""
    ids = tokenizer.encode(o.text)
    windows = [w[0] for w in getattr(model, "window_sizes", []) if w[0] > 0]
    count = o.tokens or min([w + 16 for w in windows], default=len(ids) + 1)
    count = max(2, min(count, model.config.sequence_len))
    return ids, [tokenizer.get_bos_token_id(), *itertools.islice(itertools.cycle(ids), count - 1)]


def nanogpt(o, *arguments):
    place = ["--base-dir", os.environ["NANOCHAT_BASE_DIR"]] if "NANOCHAT_BASE_DIR" in os.environ else []
    place += ["-i", o.source] + (["-g", o.model_tag] if o.model_tag else [])
    place += ["-s", str(o.step)] if o.step is not None else []
    result = subprocess.run([o.nanogpt, *arguments, *place], capture_output=True, text=True)
    if result.returncode != 0:
        give_up(result.stderr.strip())
    return result.stdout


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Other flags go to nanogpt.")
    parser.add_argument("--nanogpt", default="build/nanogpt", help="the program (default build/nanogpt)")
    parser.add_argument("-i", "--source", default="sft", help="base, mid, sft or rl (default sft)")
    parser.add_argument("-g", "--model-tag", help="such as d12 (default: the largest)")
    parser.add_argument("-s", "--step", type=int, help="(default: the last)")
    parser.add_argument("--base-dir", help="nanochat's directory (default as in nanochat)")
    parser.add_argument("--text", default=TEXT.replace("\n", " "), help="what is read")
    parser.add_argument("--tokens", type=int, help="the text is repeated to as many tokens (default: "
                        "to reach beyond the shortest window)")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of a row's length "
                        f"(default {TOLERANCE})")
    return parser.parse_known_args()


def main():
    o, rest = arguments()
    if o.base_dir:
        os.environ["NANOCHAT_BASE_DIR"] = o.base_dir
    with contextlib.redirect_stdout(sys.stderr):  # nanochat's notes
        torch, gpt, model, tokenizer = nanochat_model(o)
    text_ids, ids = ids_to_read(o, model, tokenizer)
    print(f"nanochat: {o.source}, {model.config.n_layer} layers, {len(ids)} tokens")
    ours = json.loads(nanogpt(o, "tokenize", "--json", o.text))["ids"]
    if ours != text_ids:
        at = next((i for i, (a, b) in enumerate(zip(ours, text_ids)) if a != b), min(len(ours), len(text_ids)))
        print(f"different: the tokenizers, from token {at} on. likely cause: another tokenizer.pkl")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        trace, list_of_ids = (os.path.join(folder, name) for name in ("trace", "ids.json"))
        with open(list_of_ids, "w", encoding="utf-8") as file:
            json.dump(ids, file)
        nanogpt(o, "logits", "--ids-file", list_of_ids, "--hooks", trace, "--device-type", "cpu",
                "-d", "float32", *rest)
        ours = read_trace(trace)
    return 0 if report(ours, Watch(torch, gpt, model).run(ids), o.tolerance) else 1


if __name__ == "__main__":
    sys.exit(main())
