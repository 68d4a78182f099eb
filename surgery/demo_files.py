"""The small data sets inside the package (surgery/demo_data/README.md)."""

from importlib.resources import files


def demo_file(name):
    """Path of demo_data/NAME.jsonl."""
    return str(files(__package__) / "demo_data" / f"{name}.jsonl")
