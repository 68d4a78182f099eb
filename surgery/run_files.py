"""What a run leaves beside its checkpoints: manifest, per-head history, resume state."""

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

MANIFEST = "surgery_manifest.json"
HISTORY = "surgery_history.jsonl"
STATE = "surgery_state.json"
# the same mark for a run whose divergence is not measured
UNMEASURED = "surgery_unmeasured.json"
PACKAGES = ("attention-surgery", "torch", "transformers", "triton", "accelerate", "peft", "trl", "datasets")


def versions():
    """dict of package name -> installed version, or None."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit(folder="."):
    """Commit of the git checkout around `folder`, with "-dirty" when it has changes, or None."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder, *command):
    done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_manifest(folder, config, hashes, **extra):
    """Write surgery_manifest.json: versions, data hashes, config, git commit, and `extra`."""
    manifest = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git_commit": git_commit(),
        "config": config.to_dict(),
        "probe_data_sha256": hashes,
        **extra,
    }
    write_json(Path(folder, MANIFEST), manifest)


def write_json(path, value):
    """Write JSON whole or not at all: a kill in the middle leaves the old file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


class History:
    """surgery_history.jsonl: one line an optimizer step with the per-head divergence.

    Args:
        folder: where the file lives.
        last_step: keep earlier lines up to this step (a resumed run), drop the rest; 0 starts anew.
    """

    def __init__(self, folder, last_step=0):
        self.path = Path(folder, HISTORY)
        lines = read_history(self.path, dropped=True)
        kept = [line for line in lines if line["step"] <= last_step] if last_step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def append(self, line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_history(path, dropped=False):
    """Lines of surgery_history.jsonl as dicts: step, penalty, mean_relu_divergence, positive_heads, divergence, ...

    `divergence` is [L][H]; mean_relu_divergence is the penalty without lambda.

    A last line cut short by a kill is left out.

    Args:
        path: the file or its folder.
        dropped: with the lines {"step", "dropped"} of steps whose probe was left out as not finite.
    Raises:
        ValueError: another line is malformed (its number is named).
    """
    path = Path(path)
    path = path / HISTORY if path.is_dir() else path
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path.name}, line {number}: not JSON: {error.msg}") from None
    return [line for line in parsed if dropped or "dropped" not in line]


def complete_checkpoints(folder):
    """checkpoint-N folders under `folder` that were written to the end, oldest first.

    The state file is written last, so that a checkpoint cut off by a kill does not have it.
    """
    marks = (STATE, UNMEASURED)
    found = [path for path in Path(folder).glob("checkpoint-*") if any((path / mark).is_file() for mark in marks)]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))
