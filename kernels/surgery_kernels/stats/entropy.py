"""entropy_i = -sum_j p_ij log p_ij = lse_i - sum_j p_ij s_ij, in nats.

With dlse_i/ds_ij = p_ij and d(sum_k p_ik s_ik)/ds_ij = p_ij (1 + s_ij - sum_k p_ik s_ik):

    dL/ds_ij = -g_i * p_ij * (s_ij - lse_i + entropy_i)

so dp gains -g * (s - lse), and delta gains g * entropy.
"""

from ..types import Stat


def value(s, p, lse, is_sink):
    # p is 0 where s is -inf, and 0 * -inf would be nan; lse - sum p s would cancel where the entropy is small
    return (p * (lse.unsqueeze(-1) - s).masked_fill(p == 0, 0.0)).sum(-1)


def dp(g, s, lse, is_sink):
    return -g.unsqueeze(-1) * (s - lse.unsqueeze(-1)).masked_fill(s == float("-inf"), 0.0)


def ddelta(g, value):
    return g * value


STAT = Stat("entropy", "entropy of the row's attention, nats", value, dp=dp, ddelta=ddelta)
