"""max_logit_i = max_j s_ij: the largest score, after softmax_scale and softcap (torch calls it max_scores).

Its gradient goes to the key that attains it, shared evenly between keys that tie: ds gains g [s == max] / ties.
"""

from ..types import Stat


def value(s, p, lse, is_sink):
    return s.amax(-1)


def ds(g, s, value):
    is_max = (s == value.unsqueeze(-1)).to(s.dtype)
    return (g / is_max.sum(-1).clamp_min(1.0)).unsqueeze(-1) * is_max


STAT = Stat("max_logit", "largest score of the row, after scale and softcap", value, ds=ds)
