#!/usr/bin/env python3
"""Tests tools/parity.py: what it says of two traces that differ, and, where nanochat is installed,
that nanochat computes the same as this program on the sample model.

    parity_test.py NANOGPT SAMPLE_DIR

The traces are the program's own: one as it is, one with a flag that changes the arithmetic, or with
values replaced by what a faulty program would have computed. Standard library only. Where nanochat,
or a module that it needs, is not there, the comparison with it is left out, and the output says so.
"""
import array
import cmath
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tools"))
import parity  # noqa: E402

NANOGPT, SAMPLE = sys.argv[1:3]
TOKENS = 40
IDS = [4087] + [(7 * t * t + 13 * t + 5) % 4000 for t in range(TOKENS - 1)]


def trace(*flags):
    with tempfile.TemporaryDirectory() as folder:
        hooks, out = os.path.join(folder, "hooks"), os.path.join(folder, "logits")
        subprocess.run([NANOGPT, "logits", "--ids", ",".join(map(str, IDS)), "--hooks", hooks,
                        "--out", out, "--base-dir", SAMPLE, "--device-type", "cpu", "-q", *flags],
                       check=True)
        result = parity.read_trace(hooks)
        with open(out, "rb") as file:
            assert result["hook_logits"][1].tobytes() == file.read()
    return result


PLAIN = trace()
T, H, HD = PLAIN["blocks.0.attn.hook_q"][0]
D, L = H * HD, 4


def first_and_cause(ours, theirs):
    first = next(d for d in parity.compare(ours, theirs) if d.row is not None)
    return first, parity.cause(first, ours, theirs)


class Traces(unittest.TestCase):
    def faulty(self, name, change):
        """PLAIN with rows of one value changed: change(t, row) -> row."""
        result = parity.Trace(PLAIN)
        shape = PLAIN[name][0]
        rows = [array.array("f", change(t, PLAIN.row(name, t))) for t in range(shape[0])]
        result[name] = (shape, array.array("f", b"".join(row.tobytes() for row in rows)))
        return result

    def expect(self, theirs, name, row, *words, ours=PLAIN):
        first, text = first_and_cause(ours, theirs)
        self.assertEqual((first.name, first.row), (name, row), text)
        for word in words:
            self.assertIn(word, text)
        return text

    def test_a_trace_has_every_point_in_the_order_of_the_forward_pass(self):
        names = list(PLAIN)
        self.assertEqual(names[:3], ["hook_embed", "hook_embed_norm", "hook_smear"])
        self.assertEqual(names[-4:], ["hook_backout", "ln_final.hook_normalized", "hook_logits_raw",
                                      "hook_logits"])
        for i in range(L):
            ours = [n for n in names if n.startswith(f"blocks.{i}.")]
            self.assertEqual(len(ours), 15 + (i % 2 == (L - 1) % 2))  # a gate in every other layer
        self.assertEqual(PLAIN["hook_logits"][0], [TOKENS, 4096])

    def test_pieces_of_a_long_sequence_are_joined(self):
        joined = parity.Trace()
        joined.put("x", [2, 3], array.array("f", range(6)))
        joined.put("x", [1, 3], array.array("f", [6, 7, 8]))
        self.assertEqual(joined["x"][0], [3, 3])
        self.assertEqual(list(joined.row("x", 2)), [6, 7, 8])

    def test_the_same_trace_is_equal(self):
        self.assertTrue(parity.report(PLAIN, parity.Trace(PLAIN)))

    def test_nothing_in_common_is_not_equal(self):
        self.assertFalse(parity.report(PLAIN, parity.Trace()))
        self.assertFalse(parity.report(parity.Trace(), PLAIN))

    def test_the_tolerance_is_of_the_length_of_a_row(self):
        def off(share):
            return self.faulty("hook_logits", lambda t, row: [x * (1 + share) for x in row])
        self.assertTrue(parity.report(PLAIN, off(0.5e-4)))
        self.assertFalse(parity.report(PLAIN, off(2e-4)))

    def test_flags_of_the_program_are_found_again(self):
        for flags, name, row, words in (
                (("--softcap", "20"), "hook_logits", 0, ["soft cap of 20", "soft cap of 15"]),
                (("--rope-base", "10000"), "blocks.0.attn.hook_rot_q", 1, ["base 10000 ", "base 100000 "]),
                (("--rope-table", "bf16"), "blocks.0.attn.hook_rot_q", 1, ["tables in bfloat16"]),
                (("--qk-scale", "1.15"), "blocks.0.attn.hook_rot_q", 0, ["scale 1.15", "scale 1.2"]),
                (("--short-window", "9", "--window-pattern", "SSSL"), "blocks.0.attn.hook_z", 10,
                 ["a window of 9 positions", "more than 9"])):
            text = self.expect(trace(*flags), name, row, *words)
            self.assertEqual(text.count("nanochat has"), 1, text)  # and nothing else is blamed

    def test_a_window_that_is_off_by_one_is_seen_at_its_end(self):
        nine = trace("--short-window", "9", "--window-pattern", "SSSL")
        ten = trace("--short-window", "10", "--window-pattern", "SSSL")
        self.expect(nine, "blocks.0.attn.hook_z", 10, "nanochat has a window of 9", ours=ten)

    def test_bfloat16(self):
        def cut(t, row):
            return [struct.unpack("<f", b"\0\0" + struct.pack("<f", x)[2:])[0] for x in row]
        for name in "blocks.0.attn.hook_q", "blocks.2.hook_mlp_out":
            self.expect(self.faulty(name, cut), name, 0, "nanochat has bfloat16 there")

    def test_the_sign_of_the_rotation(self):
        def turned(t, row):  # nanochat's angle is minus; here by complex numbers
            q, out = PLAIN.row("blocks.0.attn.hook_q", t), []
            for h in range(H):
                head = q[h * HD:(h + 1) * HD]
                z = [complex(head[j], head[j + HD // 2]) * cmath.exp(1j * t * 100000 ** (-2 * j / HD))
                     for j in range(HD // 2)]
                size = math.sqrt(sum(abs(v) ** 2 for v in z) / HD)
                out += [1.2 * v.real / size for v in z] + [1.2 * v.imag / size for v in z]
            return out
        self.expect(self.faulty("blocks.0.attn.hook_rot_q", turned), "blocks.0.attn.hook_rot_q", 1,
                    "nanochat has rotated by plus the angle, nanogpt rotated by minus the angle")

    def test_a_missing_qk_norm(self):
        def longer(t, row):  # each head as long as before the norm
            k = PLAIN.row("blocks.1.attn.hook_k", t)
            return [x * parity.length(k[i - i % HD:i - i % HD + HD]) / math.sqrt(HD)
                    for i, x in enumerate(row)]
        self.expect(self.faulty("blocks.1.attn.hook_rot_k", longer), "blocks.1.attn.hook_rot_k", 0,
                    "nanochat has no QK norm, nanogpt QK norm")

    def test_no_soft_cap(self):
        self.expect(self.faulty("hook_logits", lambda t, row: PLAIN.row("hook_logits_raw", t)),
                    "hook_logits", 0, "nanochat has no soft cap")

    def test_no_smear_is_not_seen_at_position_0(self):
        lambdas = parity.Trace(resid_lambdas=([L], array.array("f", [0] * L)),
                               x0_lambdas=([L], array.array("f", [0] * L)))
        total = (PLAIN.row("blocks.0.hook_resid_pre", 0)[0] / PLAIN.row("hook_embed_norm", 0)[0])
        lambdas["resid_lambdas"][1][0] = total - 0.25
        lambdas["x0_lambdas"][1][0] = 0.25
        theirs = self.faulty("blocks.0.hook_resid_pre",
                             lambda t, row: [total * x for x in PLAIN.row("hook_embed_norm", t)])
        del theirs["hook_smear"]
        theirs.update(lambdas)
        self.expect(theirs, "blocks.0.hook_resid_pre", 1, "nanochat has no smear")

    def test_a_value_embedding_that_is_left_out(self):
        theirs = self.faulty("blocks.1.attn.hook_v", lambda t, row: [x / 2 for x in row])
        theirs["blocks.1.attn.c_v"] = theirs["blocks.1.attn.hook_v"]
        self.expect(theirs, "blocks.1.attn.hook_v", 0, "nanochat has no value embedding in this layer")

    def test_relu_residual_backout_and_norm(self):
        for name, change, words in (
                ("blocks.2.mlp.hook_post", lambda t, row: [math.sqrt(x) for x in row], "nanochat has relu,"),
                ("blocks.2.hook_resid_mid", lambda t, row: PLAIN.row("blocks.2.hook_attn_out", t),
                 "nanochat has no residual connection"),
                ("blocks.2.hook_resid_post", lambda t, row: PLAIN.row("blocks.2.hook_resid_mid", t),
                 "nanochat has no MLP"),
                ("blocks.3.ln2.hook_normalized", lambda t, row: PLAIN.row("blocks.3.hook_resid_mid", t),
                 "nanochat has no norm, nanogpt RMS norm")):
            self.expect(self.faulty(name, change), name, 0, words)
        last = "blocks.3.hook_resid_post"
        theirs = self.faulty("hook_backout", lambda t, row: PLAIN.row(last, t))
        ratio = [(PLAIN.row(last, 5)[j] - PLAIN.row("hook_backout", 5)[j]) /
                 PLAIN.row("blocks.2.hook_resid_post", 5)[j] for j in range(3)]
        theirs["backout_lambda"] = ([1], array.array("f", ratio[:1]))
        self.expect(theirs, "hook_backout", 0, "nanochat has nothing taken out, nanogpt layer 2")

    def test_one_damaged_output_of_a_weight_is_told(self):
        def damaged(t, row):
            row[17] += 3
            return row
        self.expect(self.faulty("blocks.3.mlp.hook_pre", damaged), "blocks.3.mlp.hook_pre", 0,
                    "transformer.h.3.mlp.c_fc", f"only 1 of {4 * D} outputs differ, the first is 17")

    def test_not_a_number_is_never_equal(self):
        for bad in (math.nan, math.inf):
            def spoilt(t, row):
                row[3] = bad if t == 7 else row[3]
                return row
            theirs = self.faulty("blocks.2.attn.hook_z", spoilt)
            self.expect(theirs, "blocks.2.attn.hook_z", 7, "nanochat has NaN or infinity")
            self.expect(PLAIN, "blocks.2.attn.hook_z", 7, "nanogpt has NaN or infinity", ours=theirs)

    def test_a_padded_vocabulary(self):
        theirs = parity.Trace(PLAIN)
        theirs["hook_logits"] = ([T, 4160], array.array("f", bytes(4 * T * 4160)))
        self.expect(theirs, "hook_logits", 0, "only pad it to 4160")


class Nanochat(unittest.TestCase):
    def parity(self, *flags):
        return subprocess.run([sys.executable, "-B", parity.__file__, "--nanogpt", NANOGPT,
                               "--base-dir", SAMPLE, *flags], capture_output=True, text=True)

    def test_the_sample_model_is_the_same_in_nanochat(self):
        result = self.parity()
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        self.assertIn("equal: 66 values", result.stdout)

    def test_a_difference_is_found_and_named(self):
        result = self.parity("--softcap", "20", "--tokens", "8")
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertIn("first: hook_logits, position 0 of 8", result.stdout)
        self.assertIn("nanochat has a soft cap of 15", result.stdout)


def main():
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    tests, missing = [load(Traces)], ""
    try:
        import nanochat.gpt  # noqa: F401  also finds out what nanochat itself misses
        tests.append(load(Nanochat))
    except ImportError as error:
        missing = str(error)
    result = unittest.TextTestRunner(verbosity=1).run(unittest.TestSuite(tests))
    failed = len(result.failures) + len(result.errors)
    if missing:
        print(f"skipped: the comparison with nanochat itself ({missing})")
    print(f"{result.testsRun - failed} passed, {failed} failed")
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    sys.exit(main())
