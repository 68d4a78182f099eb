"""The implementations, and the choice between them. A new one is a file here and a row in BACKENDS."""

import logging

import torch

from . import cpu, reference, triton

logger = logging.getLogger("surgery_kernels")

BACKENDS = {backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND, reference.BACKEND)}
# fastest first; `reference` runs everything, with N^2 memory
AUTO_ORDER = ("cpu", "triton", "reference")

_logged = set()


def backend_reasons(inputs):
    """Why each backend can or cannot run `inputs`.

    Args:
        inputs: AttnInputs, see `make_inputs`.
    Returns:
        dict name -> list of reasons against it, in the order `auto` tries them; an empty list means it can run.
    """
    return {name: BACKENDS[name].unsupported_reasons(inputs) for name in AUTO_ORDER}


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
        for name in AUTO_ORDER:
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
