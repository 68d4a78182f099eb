"""sink_mass_i = sum_{j in S} p_ij, S the sink keys of the sequence.

With g = dL/d sink_mass and dp_ij/ds_ik = p_ij (delta_jk - p_ik):

    dL/ds_ij = p_ij * (g_i [j in S] - g_i * sink_mass_i)

so dp gains g on the sink keys, and delta gains g * sink_mass. Paper: alpha_h is the mean of these rows (eq. 2).
"""

from ..types import Stat


def value(s, p, lse, is_sink):
    return (p * is_sink).sum(-1)


def dp(g, s, lse, is_sink):
    return g.unsqueeze(-1) * is_sink


def ddelta(g, value):
    return g * value


STAT = Stat("sink_mass", "attention paid to the sink keys, in [0, 1]", value, dp=dp, ddelta=ddelta)
