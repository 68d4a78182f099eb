"""Sink mass around an attention kernel that knows nothing of it. csrc/README.md has the derivation at length.

Forward: p_ij = exp(s_ij - lse_i) on the few sink keys j. Backward, with g = dL/d sink_mass:

    ds_ij = p_ij * (dp_ij - delta_i)                    the kernel's own, with delta = rowsum(dout * out)
          + p_ij * (dlse_i - g_i * sink_mass_i)         the lse gradient, or `fold_into_out`: into the kernel's delta
          + p_ij * g_i [j in S]                         the sink keys only

A flash backward uses `out` for nothing but delta, so it can be handed an out' whose delta holds the second term. The
third is a rank-n update, `add_sink_gradient`. Where the sink is strong the sum on a sink key cancels, which a kernel
that rounds ds to 16 bits does not survive: such a kernel is not shown the sink keys at all, and their columns are
computed here in fp32, `add_sink_columns`.

in_torch has the mathematics, cuda the kernels of csrc/, vendor what the GPU backends share.
"""

from .in_torch import (
    TINY,
    SinkKeys,
    add_sink_columns,
    add_sink_gradient,
    fold_into_out,
    sink_keys,
    sink_mass,
)

__all__ = [
    "TINY",
    "SinkKeys",
    "add_sink_columns",
    "add_sink_gradient",
    "fold_into_out",
    "sink_keys",
    "sink_mass",
]
