"""The CUDA kernels' own source as a CPU library (csrc/host.h), called through the same Python as on a GPU."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from surgery_kernels.backends.sink_epilogue import build, cuda, library

GXX = shutil.which("g++")


@functools.cache
def host_library():
    folder = Path(tempfile.mkdtemp(prefix="surgery-sink-"))
    source = build.source_folder() / "api.cu"
    flags = ("-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC")
    command = [GXX, *flags, "-x", "c++", str(source), "-o", str(folder / build.NAME)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = library.open_library(folder / build.NAME)
    shutil.rmtree(folder)
    return loaded


def install(monkeypatch):
    """Make `cuda` run on CPU tensors; the list that is returned grows by the name of each launch."""
    launched = []

    def launch(name, params, inputs):
        launched.append(name)
        error = getattr(host_library(), f"surgery_sink_{name}")(ctypes.byref(params), None)
        if error:
            raise RuntimeError(f"{name}: {host_library().surgery_error_string(error).decode()}")

    def can_run(inputs):
        return inputs.q.dtype in library.DTYPES and inputs.q.shape[-1] % 8 == 0

    monkeypatch.setattr(cuda, "_launch", launch)
    monkeypatch.setattr(cuda, "can_run", can_run)
    return launched
