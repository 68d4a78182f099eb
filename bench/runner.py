"""One implementation on the tensors of a case: a forward, its backward, and both in bthd order for the check."""

from contextlib import nullcontext

import torch

from .check import GRADIENTS
from .problem import restore


class Runner:
    """`implementation` built for `case`, with several sets of inputs in its own layout.

    Args:
        problems: list of Problem, rotated through so that no call finds its inputs in the cache.
    """

    def __init__(self, implementation, case, device, problems):
        self.implementation = implementation
        self.call = implementation.build(case, device)
        self.sets = []
        for problem in problems:
            leaves, dout = problem.inputs(implementation.layout)
            self.sets.append((leaves, {"out": dout, "sink_mass": problem.dsink_mass}))

    def forward(self, index=0):
        """name -> result in the implementation's layout, with a graph when it has a backward."""
        leaves, _ = self.sets[index % len(self.sets)]
        with nullcontext() if self.implementation.backward else torch.no_grad():
            return self.call(*leaves)

    def backward(self, outputs, index=0):
        """(dq, dk, dv) in the implementation's layout, from the gradients of all that it returned."""
        leaves, upstream = self.sets[index % len(self.sets)]
        names = [name for name in upstream if name in outputs]
        return torch.autograd.grad([outputs[n] for n in names], leaves, [upstream[n] for n in names])

    def results(self):
        """name -> result of the first set in bthd order, gradients included, detached."""
        outputs, layout = self.forward(), self.implementation.layout
        grads = self.backward(outputs) if self.implementation.backward else ()
        found = {name: value.detach() for name, value in outputs.items()}
        if "out" in found:
            found["out"] = restore(found["out"], layout)
        return found | {name: restore(x, layout) for name, x in zip(GRADIENTS, grads, strict=False)}
