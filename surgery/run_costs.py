"""What a run costs while it trains: seconds of each step, peak memory."""

import resource
import time

import torch
from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, in `seconds`; comes before the regulariser's callback, whose probe counts."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def peak_bytes():
    """Peak of this process: allocated on the GPU, resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
