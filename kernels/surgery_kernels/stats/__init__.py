"""The statistics. A new one is a file here and a row in STATS; tests and bench iterate over the table."""

from . import entropy, max_logit, sink_mass

STATS = {stat.name: stat for stat in (sink_mass.STAT, entropy.STAT, max_logit.STAT)}
