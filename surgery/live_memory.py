"""Peak bytes of live tensors, for real CPU tensors and for fake ones, exact to the storage."""

import itertools
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators create inside the `with` block, from creation until they are freed.

        with LiveMemory(model.parameters(), model.buffers()) as memory:
            loss = model(**batch).loss
            loss.backward()
        memory.peak    # bytes, the inputs alive at the start included

    A storage counts once, however many views it has, and leaves the count when its last owner goes: a Python name,
    autograd's saved tensors, a `.grad`. On real tensors our own operators are looked into, so their temporaries
    count; temporaries inside aten's C++ kernels do not, and neither do those of any operator on fake tensors.
    A storage that is resized later keeps the size at which it was first seen.

    Args:
        *alive: tensors or iterables of tensors (None is skipped) that exist already: parameters, buffers, gradients,
            optimizer state. Storages that are not named here and were made outside count from their first use as an
            operator's result (an in-place update), never as an operator's input.
    Attributes:
        live: bytes alive now.
        peak: largest `live` so far.
        resident: bytes of `alive`.
    """

    def __init__(self, *alive):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = weakref.WeakKeyDictionary()
        for tensor in itertools.chain.from_iterable([x] if isinstance(x, torch.Tensor) else x for x in alive):
            if tensor is not None:
                self._add(tensor)
        self.resident = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self._call(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result

    def _call(self, func, args, kwargs):
        if func.namespace != "surgery" or _any_fake(args, kwargs):
            return func(*args, **kwargs)
        # straight to the kernel with the mode on again: what it allocates inside counts too
        with self:
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.live -= size


def _any_fake(args, kwargs):
    return any(isinstance(x, torch._subclasses.FakeTensor) for x in tree_leaves((args, kwargs)))


def gradients(parameters):
    """The `.grad` of `parameters` that exist."""
    return [p.grad for p in parameters if p.grad is not None]


def optimizer_state(optimizer):
    """The tensors in an optimizer's state."""
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
