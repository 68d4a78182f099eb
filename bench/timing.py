"""Times of interleaved implementations, and the matrix product that nothing can beat.

On a GPU a region is timed by events, behind a kernel that only waits: the host queues the whole step meanwhile, so
that gaps between launches do not count. What the host needs to queue a step is `host`. On a CPU the wall clock counts.
"""

import time
from dataclasses import dataclass, field

import torch

from .out_of_memory import is_out_of_memory, release
from .records import quantiles

MODES = ("forward", "backward", "both")
WARM_UP = {"cuda": 3, "cpu": 1}
LEAST_REPETITIONS = 5
# clock cycles a second that the waiting kernel is sized with, a little more than any GPU has
CYCLES = 2.2e9
LONGEST_WAIT = 0.05
# inputs of one round must not fit into the last cache level together
CACHE_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass
class Times:
    """Seconds of each repetition by mode; `host`: seconds the CPU needed to queue forward and backward (GPU only)."""

    forward: list = field(default_factory=list)
    backward: list = field(default_factory=list)
    both: list = field(default_factory=list)
    host: list = field(default_factory=list)


def input_sets(nbytes, device, least=2, most=8):
    """How many sets of inputs of `nbytes` to rotate through."""
    return max(least, min(most, -(-CACHE_BYTES[device] // max(1, nbytes))))


class _Cpu:
    def step(self, runner, index, wait):
        start = time.perf_counter()
        outputs = runner.forward(index)
        middle = time.perf_counter()
        if runner.implementation.backward:
            runner.backward(outputs, index)
        stop = time.perf_counter()
        return middle - start, stop - middle, 0.0


class _Cuda:
    def step(self, runner, index, wait):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        if wait:
            torch.cuda._sleep(int(wait * CYCLES))
        begin = time.perf_counter()
        events[0].record()
        outputs = runner.forward(index)
        events[1].record()
        if runner.implementation.backward:
            runner.backward(outputs, index)
        events[2].record()
        host = time.perf_counter() - begin
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, events[1].elapsed_time(events[2]) / 1e3, host


def measure(runners, device, repetitions=20, seconds=10.0):
    """Time every runner, interleaved, the order turned by one each round.

    Every backward follows a forward of its own, as in training.

    Args:
        runners: dict name -> Runner.
        repetitions: rounds; after LEAST_REPETITIONS it stops between rounds when `seconds` have passed.
    Returns:
        dict name -> Times, or None where it ran out of memory.
    """
    clock = _Cuda() if device == "cuda" else _Cpu()
    times = {name: Times() for name in runners}
    waits = {}
    for name, runner in runners.items():
        for index in range(WARM_UP[device]):
            step = _step(clock, runner, index, 0.0, device)
            if step is None:
                times[name] = None
                break
            # half as long again as the host took in the last, warm, step
            waits[name] = min(LONGEST_WAIT, 1.5 * step[2] + 2e-4)
    begin = time.perf_counter()
    order = [name for name in runners if times[name] is not None]
    for repetition in range(repetitions):
        turn = repetition % max(1, len(order))
        for name in order[turn:] + order[:turn]:
            if times[name] is None:
                continue
            step = _step(clock, runners[name], repetition, waits[name], device)
            if step is None:
                times[name] = None
                continue
            forward, backward, host = step
            times[name].forward.append(forward)
            if runners[name].implementation.backward:
                times[name].backward.append(backward)
                times[name].both.append(forward + backward)
            if device == "cuda":
                times[name].host.append(host)
        if repetition + 1 >= LEAST_REPETITIONS and time.perf_counter() - begin > seconds:
            break
    return times


def _step(clock, runner, index, wait, device):
    """One timed step, or None when it ran out of memory."""
    try:
        return clock.step(runner, index, wait)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler: the traceback no longer holds the step's tensors
    release(device)
    return None


def matmul_ceiling(dtype, device, repetitions=20):
    """FLOP/s of a large square matrix product of random numbers: (p50, p20, p80) of the repetitions."""
    size = MATMUL_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for repetition in range(WARM_UP[device] + repetitions):
        if device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            a @ b
            stop.record()
            torch.cuda.synchronize()
            seconds = start.elapsed_time(stop) / 1e3
        else:
            begin = time.perf_counter()
            a @ b
            seconds = time.perf_counter() - begin
        if repetition >= WARM_UP[device]:
            rates.append(2 * size**3 / seconds)
    return quantiles(rates)
