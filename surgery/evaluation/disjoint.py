"""Are the evaluation prompts unseen: not among the training rows, the probes, nor one another's sets."""

import re
from collections import defaultdict

_WORD = re.compile(r"\w+")
SIMILARITY = 0.8


def overlaps(prompts, rows, similarity=SIMILARITY):
    """Evaluation prompts that are among other prompts, word for word or nearly.

    Args:
        prompts: dict id -> text.
        rows: list of texts.
        similarity: Jaccard similarity of the two sets of words from which on a pair counts, in (0, 1]; 1 finds
            those that differ in order, case and punctuation only.
    Returns:
        dict id -> index of the first such row.
    Raises:
        ValueError: similarity out of range.
    """
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity must be in (0, 1], got {similarity}")
    words = [frozenset(_WORD.findall(text.lower())) for text in rows]
    holders = defaultdict(list)
    for i, one in enumerate(words):
        for word in one:
            holders[word].append(i)
    found = {}
    for name, text in prompts.items():
        mine = set(_WORD.findall(text.lower()))
        # two sets that alike share one of the first words of the rarest order: enough to look at those holders
        rarest = sorted(mine, key=lambda word: len(holders.get(word, ())))
        needed = rarest[: len(mine) - int(similarity * len(mine)) + 1]
        candidates = sorted({i for word in needed for i in holders.get(word, ())})
        for i in candidates:
            union = len(mine | words[i])
            if union and len(mine & words[i]) >= similarity * union:
                found[name] = i
                break
    return found


def prompt_texts(row):
    """Every text in a training or probe row that may ask something: its user turns, prompt, or whole text."""
    if "messages" in row:
        return [message["content"] for message in row["messages"] if message.get("role") == "user"]
    return [row[key] for key in ("prompt", "text") if isinstance(row.get(key), str)]
