"""Does the defence work: prompts of the field's benchmarks, answers, judges, scores with intervals.

prompts -> answers -> judges -> scores; `cli/eval.py` runs them in that order. Texts stay in the user's answer file:
verdicts, scores and logs hold ids and numbers.
"""

from .answers import answer_prompts, read_answers
from .judge import JUDGES, Judge, Verdict, load_judge
from .prompts import BENCHMARKS, Prompt, load_prompts
from .scores import compare_scores, score_verdicts

__all__ = [
    "BENCHMARKS",
    "JUDGES",
    "Judge",
    "Prompt",
    "Verdict",
    "answer_prompts",
    "compare_scores",
    "load_judge",
    "load_prompts",
    "read_answers",
    "score_verdicts",
]
