"""Run every Triton kernel once on small, awkward problems: what compute-sanitizer watches.

    SURGERY_SELF_CHECK=0 compute-sanitizer --tool memcheck python tests/ops/gpu_sanitizer.py

Without a GPU: TRITON_INTERPRET=1. Results are checked for nan only; tests/ops/test_triton.py checks what they are.
"""

import os
import sys

import surgery_kernels as sk
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_STATS = tuple(sk.STATS)
# name -> (length, head_dim, options): odd lengths, two chunks of channels, windows, padding on both sides
PROBLEMS = {
    "causal": (97, 64, {}),
    "positions": (150, 64, {"sinks": [[3, 140], [70, 71]]}),
    "chunks": (65, 80, {"softcap": 5.0}),
    "window": (130, 64, {"window_size": (20, 5), "causal": False}),
    "padded": (100, 64, {"leftpad_k": [3, 40], "seqused_q": [100, 70], "seqused_k": [100, 70]}),
}


def int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def leaves(*lead, head_dim, dtype):
    heads = (4, 2, 2)
    return [torch.randn(*lead, n, head_dim, device=DEVICE, dtype=dtype, requires_grad=True) for n in heads]


def finish(name, qkv, result):
    """Backward of every output, and a look at the gradients."""
    rows = [x.masked_fill(x.isinf(), 0.0).sum() for x in (result.lse, *result.stats.values())]
    (result.out.float().sum() + sum(rows)).backward()
    if not all(x.grad.isfinite().all() for x in qkv):
        raise SystemExit(f"{name}: a gradient is not finite")
    print(name, flush=True)


def main():
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    for backward in ("two_pass", "single_pass"):
        os.environ["SURGERY_BACKWARD"] = backward
        for name, (length, head_dim, options) in PROBLEMS.items():
            tensors = {key: int32(x) if isinstance(x, list) else x for key, x in options.items()}
            qkv = leaves(2, length, head_dim=head_dim, dtype=dtype)
            result = sk.flash_attn_stats(*qkv, stats=ALL_STATS, backend="triton", **tensors)
            finish(f"{backward} {name}", qkv, result)
        qkv = leaves(90, head_dim=64, dtype=dtype)
        bounds = int32([0, 17, 17, 90])
        result = sk.flash_attn_stats_varlen(*qkv, bounds, bounds, 73, 73, stats=ALL_STATS, backend="triton")
        finish(f"{backward} packed", qkv, result)
    qkv = [x.detach() for x in leaves(2, 77, head_dim=64, dtype=dtype)]
    lse = sk.flash_attn_stats(*qkv, stats=(), backend="triton").lse
    sk.column_mass(sk.make_inputs(*qkv), lse)
    print("column_mass")
    return 0


if __name__ == "__main__":
    sys.exit(main())
