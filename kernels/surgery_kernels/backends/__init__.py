"""The implementations, and the choice between them. A new one is a file here and a row in BACKENDS."""

import logging

import torch

from . import choice, cpu, cudnn, fa4, flash, reference, triton

logger = logging.getLogger("surgery_kernels")

BACKENDS = {
    backend.name: backend
    for backend in (cpu.BACKEND, fa4.BACKEND, cudnn.BACKEND, flash.BACKEND, triton.BACKEND, reference.BACKEND)
}
# every backend that `auto` may take; which first depends on the problem (choice.py), `reference` is the last
AUTO_ORDER = choice.DEFAULT
# head dims and lengths that the choice tells apart
HEAD_DIMS = (64, 96, 128, 192, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

_logged = set()


def _capability(device_type, index):
    if device_type != "cuda" or torch.version.hip:
        return None
    return torch.cuda.get_device_capability(index)


# asked once, not traced
_capability._dynamo_marked_constant = True


def backend_order(inputs):
    """The backends in the order `auto` tries them.

    Args:
        inputs: AttnInputs, see `make_inputs`.
    Returns:
        dict name -> why it stands there.
    """
    return choice.order(*_problem(inputs))


def _problem(inputs):
    """What the order depends on: (capability, head_dim, length)."""
    q, length = inputs.q, inputs.max_seqlen_k
    capability = _capability(q.device.type, q.device.index)
    if capability is None:
        return None, 1, 1
    return capability, _step(q.shape[-1], HEAD_DIMS), _step(length, LENGTHS)


def _step(size, steps):
    # compared and not passed on: with dynamic shapes it is symbolic, and this costs a guard a step
    for step in steps:
        if size <= step:
            return step
    return steps[-1]


def _names_in_order(capability, head_dim, length):
    return tuple(choice.order(capability, head_dim, length))


# a tuple: torch 2.11 cannot trace a constant dict
_names_in_order._dynamo_marked_constant = True


def backend_reasons(inputs):
    """Why each backend can or cannot run `inputs`.

    Args:
        inputs: AttnInputs, see `make_inputs`.
    Returns:
        dict name -> list of reasons against it, in the order `auto` tries them; an empty list means it can run.
    """
    return {name: BACKENDS[name].unsupported_reasons(inputs) for name in _names_in_order(*_problem(inputs))}


def choose_backend(inputs, backend="auto"):
    """Name of the backend that runs `inputs`.

    Args:
        inputs: AttnInputs.
        backend: a key of BACKENDS, which then must be able to run them, or "auto": the first that can.
    Raises:
        ValueError: unknown name, or the named backend cannot run these inputs; all its reasons are listed.
    """
    if backend == "auto":
        rejected = {}
        for name in _names_in_order(*_problem(inputs)):
            reasons = BACKENDS[name].unsupported_reasons(inputs)
            if not reasons:
                _log_fallback(name, rejected)
                return name
            rejected[name] = reasons
        raise ValueError(f"no backend can run these inputs: {rejected}")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: 'auto', {', '.join(map(repr, BACKENDS))}")
    reasons = BACKENDS[backend].unsupported_reasons(inputs)
    if reasons:
        raise ValueError(f"backend {backend!r} cannot run these inputs: {'; '.join(reasons)}")
    return backend


def _log_fallback(name, rejected):
    if name != "reference" or torch.compiler.is_compiling():
        return
    message = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in rejected.items())
    if message not in _logged:
        _logged.add(message)
        logger.warning("backend 'reference' materialises the score matrix; the others cannot run: %s", message)
