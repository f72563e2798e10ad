#!/usr/bin/env python3
"""Writes a checkpoint of random weights in nanochat's shape, for benchmarks. Standard library only.

    tools/make_checkpoint.py --depth 12 --out DIR       DIR/base_checkpoints/d12/{model,meta}_000000.*
                                                        and DIR/tokenizer/tokenizer.pkl

The newest generation (G4) as CUDA trains it: embeddings bfloat16, everything else float32. The values are
uniform with the spread nanochat initialises with; a block of a million fresh random numbers is repeated at
odd offsets, since a benchmark needs different bytes, not independent ones.
"""
import argparse
import array
import json
import os
import pickle
import random
import struct
import sys
import types
import zlib


class Writer:
    """A stored zip as torch.save writes it: data at multiples of 64 bytes, sizes in the directory."""
    def __init__(self, path, top):
        self.file, self.top, self.entries = open(path, "wb"), top, []

    def add(self, name, chunks):
        name = f"{self.top}/{name}".encode()
        header = self.file.tell()
        pad = -(header + 30 + len(name) + 4) % 64
        extra = struct.pack("<HH", 0x4246, pad) + b"Z" * pad
        self.file.write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x0808, 0, 0, 0, 0, 0, 0, len(name), len(extra)))
        self.file.write(name + extra)
        crc = size = 0
        for chunk in chunks:
            self.file.write(chunk)
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
        self.file.write(struct.pack("<IIII", 0x08074B50, crc, size, size))
        self.entries.append((name, header, crc, size))

    def close(self):
        start = self.file.tell()
        for name, header, crc, size in self.entries:
            assert size < 2**32 - 1 and header < 2**63
            extra = struct.pack("<HHQ", 1, 8, header) if header >= 2**32 - 1 else b""
            self.file.write(struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 0, 0, 0x0808, 0, 0, 0, crc, size, size,
                                        len(name), len(extra), 0, 0, 0, 0, min(header, 2**32 - 1)) + name + extra)
        end, n = self.file.tell(), len(self.entries)
        self.file.write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0, 45, 0, 0, n, n, end - start, start))
        self.file.write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        self.file.write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, n, n, min(end - start, 2**32 - 1),
                                    min(start, 2**32 - 1), 0))
        self.file.close()


def state_dict_pickle(tensors):
    """The opcodes torch.save emits for an OrderedDict of tensors."""
    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def integer(n):
        return b"J" + struct.pack("<i", n)

    out = b"\x80\x02ccollections\nOrderedDict\n)R("
    for key, (name, kind, shape) in enumerate(tensors):
        numel, strides = 1, []
        for d in reversed(shape):
            strides.insert(0, numel)
            numel *= d
        kind_name = {"f": "FloatStorage", "b": "BFloat16Storage"}[kind]
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
        out += f"ctorch\n{kind_name}\n".encode() + text(str(key)) + text("cpu") + integer(numel) + b"tQ" + integer(0)
        out += b"(" + b"".join(map(integer, shape)) + b"t(" + b"".join(map(integer, strides)) + b"t"
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"u."


class Encoding:
    """What a pickle of tiktoken's class of this name holds."""
    def __init__(self, vocab):
        names = ["bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end",
                 "output_start", "output_end"]
        plain = vocab - len(names)
        pairs = [bytes([97 + i // 26, 97 + i % 26]) for i in range(26 * 26)]
        tokens = [bytes([i]) for i in range(256)] + pairs + [a + b for a in pairs for b in pairs]
        self.name = "rustbpe"
        self.pat_str = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                        r"|\s*[\r\n]|\s+(?!\S)|\s+")
        self.mergeable_ranks = {token: rank for rank, token in enumerate(tokens[:plain])}
        self.special_tokens = {f"<|{name}|>": plain + i for i, name in enumerate(names)}


def write_tokenizer(path, vocab):
    """Bytes, two letters, four letters: a text takes as many as with a bad tokenizer, a benchmark does not care."""
    Encoding.__module__ = "tiktoken.core"
    sys.modules["tiktoken"] = types.ModuleType("tiktoken")
    sys.modules["tiktoken.core"] = types.SimpleNamespace(Encoding=Encoding)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        pickle.dump(Encoding(vocab), f, protocol=4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    L, D, V = args.depth, 64 * args.depth, args.vocab
    H = D // 128
    tensors = [("resid_lambdas", "f", (L,)), ("x0_lambdas", "f", (L,)), ("smear_lambda", "f", (1,)),
               ("backout_lambda", "f", (1,)), ("transformer.wte.weight", "b", (V, D))]
    for i in range(L):
        h = f"transformer.h.{i}."
        tensors += [(h + f"attn.{n}.weight", "f", (D, D)) for n in ("c_q", "c_k", "c_v", "c_proj")]
        if i % 2 == (L - 1) % 2:
            tensors.append((h + "attn.ve_gate.weight", "f", (H, 12)))
        tensors += [(h + "mlp.c_fc.weight", "f", (4 * D, D)), (h + "mlp.c_proj.weight", "f", (D, 4 * D))]
    tensors += [("lm_head.weight", "f", (V, D)), ("smear_gate.weight", "f", (1, 24))]
    tensors += [(f"value_embeds.{i}.weight", "b", (V, D)) for i in range(L) if i % 2 == (L - 1) % 2]

    folder = os.path.join(args.out, "base_checkpoints", f"d{L}")
    os.makedirs(folder, exist_ok=True)
    rng = random.Random()
    bound = (3 / D) ** 0.5
    block = array.array("f", (rng.uniform(-bound, bound) for _ in range(1 << 20))).tobytes()
    half = b"".join(block[i + 2:i + 4] for i in range(0, len(block), 4))  # bfloat16: the upper halves
    writer = Writer(os.path.join(folder, "model_000000.pt"), "model_000000")
    writer.add("data.pkl", [state_dict_pickle(tensors)])
    for key, (name, kind, shape) in enumerate(tensors):
        size = (4 if kind == "f" else 2)
        for d in shape:
            size *= d

        def chunks(left=size, source=block if kind == "f" else half, name=name):
            if name == "lm_head.weight":  # single bytes are no text: they never are among the likeliest
                yield bytes(256 * 4 * D)
                left -= 256 * 4 * D
            while left > 0:
                start = 64 * rng.randrange(len(source) // 128)
                piece = source[start:start + left]
                left -= len(piece)
                yield piece
        if name == "resid_lambdas":
            writer.add(f"data/{key}", [array.array("f", [1.0] * L).tobytes()])
        else:
            writer.add(f"data/{key}", chunks())
    writer.add("version", [b"3\n"])
    writer.close()
    with open(os.path.join(folder, "meta_000000.json"), "w") as f:
        json.dump({"step": 0, "val_bpb": None, "model_config": {
            "sequence_len": 2048, "vocab_size": V, "n_layer": L, "n_head": H, "n_kv_head": H, "n_embd": D,
            "window_pattern": "SSSL"}}, f, indent=2)
    write_tokenizer(os.path.join(args.out, "tokenizer", "tokenizer.pkl"), V)
    print(folder)


if __name__ == "__main__":
    main()
