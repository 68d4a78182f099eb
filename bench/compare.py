"""What became slower, larger or wrong from one CSV to another.

    python -m bench.compare before.csv after.csv

Rows are joined on every column that names what was measured. A row is a regression when its median is worse by more
than `--threshold` and the two bands from p20 to p80 do not overlap, when a value became red, oom or an error, or when
it is gone. Exit status 1 then. Times and bytes are compared; rates are the same numbers turned round. Of rows with one
key in a file the last counts. Times of different devices, or of a machine that was not quiet, say nothing: files of
different devices are refused.
"""

import argparse
import sys

from .records import ENVIRONMENT, VALUES, read_csv

NOT_KEY = {*VALUES, *ENVIRONMENT, "unit", "repetitions", "note", "run"}
# lower is better
COMPARED = ("s", "byte")
FAILED = ("red", "oom", "error")


def by_key(rows):
    """Key -> row; a key is ((column, value), ...) of what was measured."""
    return {tuple((name, value) for name, value in row.items() if name not in NOT_KEY): row for row in rows}


def verdict(before, after, threshold):
    """(word, sentence) for two rows of one key; the word is regression, better, same or skipped."""
    if before["unit"] not in (*COMPARED, "pass"):
        return "skipped", ""
    if after["unit"] in (*FAILED, "unsupported"):
        return "regression", f"{before['unit']} became {after['unit']}"
    unit = after["unit"]
    if unit not in COMPARED:
        return "skipped", ""
    ratio = after["p50"] / before["p50"]
    apart = after["p20"] > before["p80"] or after["p80"] < before["p20"]
    sentence = (
        f"{before['p50']:.4g} to {after['p50']:.4g} {unit} (x {ratio:.3f}), bands "
        f"{before['p20']:.4g}..{before['p80']:.4g} and {after['p20']:.4g}..{after['p80']:.4g}"
    )
    if not apart or abs(ratio - 1) <= threshold:
        return "same", sentence
    return ("regression" if ratio > 1 else "better"), sentence


def compare(before, after, threshold=0.02, allow_missing=False):
    """List of (word, key as text, sentence) for every row of `before` that says something.

    Raises:
        ValueError: the rows come from different devices, or share no key.
    """
    devices = [sorted({row.get("device", "") for row in rows}) for rows in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"both must come from one device, got {devices[0]} and {devices[1]}")
    old, new = by_key(before), by_key(after)
    if not old.keys() & new.keys():
        raise ValueError("the two share no row: other cases, or another tool")
    found = []
    for key, row in old.items():
        label = " ".join(value for _, value in key if value)
        if key in new:
            word, sentence = verdict(row, new[key], threshold)
            if word != "skipped":
                found.append((word, label, sentence))
        elif not allow_missing and row["unit"] in COMPARED:
            gone = _failure(key, new)
            found.append(("regression", label, gone or "gone"))
    return found


def _failure(key, rows):
    """Why the implementation of `key` has no such row: its failed row of the same case, if there is one."""
    case = {(name, value) for name, value in key if name not in ("metric", "mode")}
    for other, row in rows.items():
        if case <= set(other) and row["unit"] in FAILED:
            return f"is now {row['unit']}"
    return ""


def main(argv=None):
    """Returns 0, 1 when something became worse, 2 when the files cannot be compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--threshold", type=float, default=0.02, help="smallest change that counts (default: 0.02)")
    parser.add_argument("--allow-missing", action="store_true", help="rows that are gone are no regression")
    options = parser.parse_args(argv)
    try:
        rows = (read_csv(options.before), read_csv(options.after))
        found = compare(*rows, options.threshold, options.allow_missing)
    except (OSError, ValueError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    for word in ("regression", "better"):
        for line in (f"{word}  {label}: {sentence}" for each, label, sentence in found if each == word):
            print(line)
    counts = {word: sum(each == word for each, _, _ in found) for word in ("regression", "better", "same")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["regression"] > 0)


if __name__ == "__main__":
    sys.exit(main())
