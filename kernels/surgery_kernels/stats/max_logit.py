"""max_logit_i = max_j s_ij: the largest score, after softmax_scale and softcap (torch calls it max_scores).

Its gradient goes to the key that attains it, shared evenly between keys that tie: ds gains g [s == max] / ties.
"""

from ..types import Stat


def value(s, p, lse, is_sink):
    return s.amax(-1)


def ds(g, s, value):
    # not `value`: a backward that rounds s differently would find no key that equals it, and drop the gradient
    is_max = (s == s.amax(-1, keepdim=True)).to(s.dtype)
    return (g / is_max.sum(-1).clamp_min(1.0)).unsqueeze(-1) * is_max


STAT = Stat("max_logit", "largest score of the row, after scale and softcap", value, ds=ds)
