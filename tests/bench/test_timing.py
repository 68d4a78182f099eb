"""Order, repetitions and failures of interleaved timing, on runners that only write down what happens."""

from types import SimpleNamespace

import pytest
import torch

from bench import timing
from bench.records import quantiles
from bench.timing import LEAST_REPETITIONS, input_sets, matmul_ceiling, measure

WARM_UP = timing.WARM_UP["cpu"]


class Runner:
    """Notes each call in `log`; raises `error` from call number `fails_at` on."""

    def __init__(self, name, log, clock=None, cost=(0, 0), backward=True, fails_at=None, error="out of memory"):
        self.implementation = SimpleNamespace(backward=backward)
        self.name, self.log, self.clock, self.cost = name, log, clock, cost
        self.fails_at, self.error, self.calls = fails_at, error, 0

    def forward(self, index):
        if self.calls == self.fails_at:
            raise RuntimeError(self.error)
        self.calls += 1
        self.log.append((self.name, "forward", index))
        self._advance(0)
        return "outputs"

    def backward(self, outputs, index):
        assert outputs == "outputs"
        self.log.append((self.name, "backward", index))
        self._advance(1)

    def _advance(self, which):
        if self.clock:
            self.clock.now += self.cost[which]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


def test_rounds_are_interleaved_and_turned():
    log = []
    measure({name: Runner(name, log) for name in "abc"}, "cpu", repetitions=3)
    timed = [name for name, what, _ in log if what == "forward"][3 * WARM_UP :]
    assert "".join(timed) == "abc" + "bca" + "cab"
    # inputs change with the round and are the same for all of it; each backward follows its forward
    rounds = [index for _, what, index in log if what == "forward"][3 * WARM_UP :]
    assert rounds == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [what for _, what, _ in log] == ["forward", "backward"] * (len(log) // 2)


def test_times_are_those_of_the_clock(clock):
    times = measure({"a": Runner("a", [], clock, (2.0, 3.0)), "b": Runner("b", [], clock, (1.0, 1.0))}, "cpu", 4, 1e9)
    assert times["a"].forward == [2.0] * 4
    assert times["a"].backward == [3.0] * 4
    assert times["a"].both == [5.0] * 4
    assert times["b"].both == [2.0] * 4


def test_a_forward_only_implementation_has_no_backward_times(clock):
    log = []
    times = measure({"a": Runner("a", log, clock, (2.0, 0.0), backward=False)}, "cpu", 2)["a"]
    assert (times.forward, times.backward, times.both) == ([2.0, 2.0], [], [])
    assert {what for _, what, _ in log} == {"forward"}


def test_seconds_end_a_case_after_the_least_repetitions(clock):
    times = measure({"a": Runner("a", [], clock, (2.0, 3.0))}, "cpu", repetitions=50, seconds=1.0)
    assert len(times["a"].both) == LEAST_REPETITIONS
    times = measure({"a": Runner("a", [], clock, (2.0, 3.0))}, "cpu", repetitions=50, seconds=39.0)
    assert len(times["a"].both) == 8


@pytest.mark.parametrize("fails_at", [0, WARM_UP + 1], ids=["warm-up", "timed"])
def test_out_of_memory_ends_one_implementation_and_not_the_others(fails_at):
    times = measure({"a": Runner("a", [], fails_at=fails_at), "b": Runner("b", [])}, "cpu", repetitions=4)
    assert times["a"] is None
    assert len(times["b"].both) == 4


def test_other_errors_are_raised():
    with pytest.raises(RuntimeError, match="shapes"):
        measure({"a": Runner("a", [], fails_at=4, error="shapes do not match")}, "cpu", repetitions=4)


def test_input_sets_exceed_the_cache():
    assert input_sets(1 << 20, "cuda") == 8
    assert input_sets(64 << 20, "cuda") == 4
    assert input_sets(1 << 30, "cuda") == 2


def test_matmul_ceiling(monkeypatch):
    monkeypatch.setitem(timing.MATMUL_SIZE, "cpu", 64)
    p50, p20, p80 = matmul_ceiling(torch.float32, "cpu", repetitions=5)
    assert 0 < p20 <= p50 <= p80


def test_quantiles():
    assert quantiles([3.0]) == (3.0, 3.0, 3.0)
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


class Device:
    """Stands in for a GPU with a queue: kernels take time on it, the host takes time to queue them."""

    def __init__(self, monkeypatch):
        self.host = self.free = 0.0
        self.waits = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def run(self, kernel, queueing=0.0):
        self.host += queueing
        self.free = max(self.free, self.host) + kernel

    def sleep(self, cycles):
        self.waits.append(cycles)
        self.run(cycles / timing.CYCLES)

    def synchronize(self):
        self.host = max(self.host, self.free)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.free, self.device.host)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Launches:
    """Forward and backward of a few short kernels each, slower to queue than to run."""

    def __init__(self, device, backward=True):
        self.device, self.implementation = device, SimpleNamespace(backward=backward)

    def forward(self, index):
        for _ in range(3):
            self.device.run(kernel=1e-4, queueing=1e-3)
        return "outputs"

    def backward(self, outputs, index):
        for _ in range(5):
            self.device.run(kernel=1e-4, queueing=1e-3)


def test_gaps_between_launches_do_not_count(monkeypatch):
    device = Device(monkeypatch)
    times = measure({"a": Launches(device)}, "cuda", repetitions=4)["a"]
    assert times.forward == pytest.approx([3e-4] * 4)
    assert times.backward == pytest.approx([5e-4] * 4)
    assert times.both == pytest.approx([8e-4] * 4)
    # what the host needs is told apart, and the wait covers it
    assert times.host == pytest.approx([8e-3] * 4)
    assert device.waits == [int((1.5 * 8e-3 + 2e-4) * timing.CYCLES)] * 4


def test_the_wait_has_an_end(monkeypatch):
    monkeypatch.setattr(timing, "LONGEST_WAIT", 1e-3)
    device = Device(monkeypatch)
    times = measure({"a": Launches(device, backward=False)}, "cuda", repetitions=2)["a"]
    assert device.waits == [int(1e-3 * timing.CYCLES)] * 2
    assert times.backward == times.both == []
    # then gaps do count, and host_time in the CSV shows that they must
    assert times.forward[0] > 3e-4
