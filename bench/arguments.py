"""Types of command-line arguments that the tools share."""

import argparse


def names(known):
    """argparse type: comma-separated names out of `known`."""

    def parse(text):
        chosen = [name for name in text.split(",") if name]
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown) or 'nothing'}; known: {', '.join(known)}")
        return chosen

    return parse


def one_length(text):
    """argparse type: a positive int; 4k is 4096."""
    digits, unit = (text[:-1], 1024) if text.endswith("k") else (text, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive int like 512 or 4k, got {text!r}")
    return int(digits) * unit


def lengths(text):
    """argparse type: comma-separated positive ints; 4k is 4096."""
    return [one_length(part) for part in text.split(",")]
