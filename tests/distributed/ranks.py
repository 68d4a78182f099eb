"""Start the ranks of a test as processes of their own, with a deadline."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# the caller's rank must not reach the processes
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more):
    """A child's environment: this checkout, one thread, no launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), kept.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**kept, **fixed, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", **more}


def run_ranks(script, *arguments, folder, ranks=2, timeout=240, **more):
    """Run tests/distributed/`script` as `ranks` processes and return what each wrote, parsed from JSON.

    A script gets its arguments and, last, the file it must write; the process group's store is a file in `folder`.

    Raises:
        AssertionError: a rank failed (with the end of its output), or the deadline passed.
    """
    processes, port = [], free_port()
    for rank in range(ranks):
        group = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        # accelerate asks for them; they are used only where a script does not join the group through the file
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        output = folder / f"rank{rank}.json"
        log = open(folder / f"rank{rank}.log", "w", encoding="utf-8")  # noqa: SIM115
        command = [sys.executable, str(HERE / script), *map(str, arguments), str(output)]
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(**group, STORE=f"file://{folder / 'store'}", **more),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        processes.append((child, log))
    deadline = time.monotonic() + timeout
    try:
        for child, _ in processes:
            child.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        late = [child for child, _ in processes if child.poll() is None]
        for child, log in processes:
            child.kill()
            child.wait()
            log.close()
    for rank, (child, log) in enumerate(processes):
        end = Path(log.name).read_text(encoding="utf-8")[-3000:]
        assert child not in late, f"rank {rank} did not end in {timeout} s:\n{end}"
        assert child.returncode == 0, f"rank {rank} failed:\n{end}"
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_group():
    """Inside a rank: join the process group, if there is more than one. Waiting for another rank ends in a minute."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if os.environ["WORLD_SIZE"] == "1":
        for name in LAUNCHER:
            os.environ.pop(name, None)
        return 0, 1
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    options = {"rank": rank, "world_size": ranks, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=os.environ["STORE"], **options)
    return rank, ranks
