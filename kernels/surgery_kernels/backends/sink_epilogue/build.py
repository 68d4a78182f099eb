"""Compile csrc/ into one shared library with nvcc alone: no torch headers, no Python headers. Standard library only,
because setup.py runs this file too.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAME = "libsurgery_sink.so"
# machine code for these, and PTX of the oldest, from which a driver makes code for anything newer
ARCHS = (80, 90, 100)
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC")


class BuildError(RuntimeError):
    """Why there is no library."""


def source_folder():
    """csrc/ of a checkout, or its copy inside an installed package."""
    here = Path(__file__).resolve()
    for folder in (here.parents[2] / "csrc", here.parents[4] / "csrc"):
        if (folder / "api.cu").exists():
            return folder
    raise BuildError("the CUDA sources (csrc/) are not installed")


def find_nvcc():
    """Path of nvcc: $CUDA_HOME/bin, then PATH, then /usr/local/cuda."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    places += [Path(on_path)] if on_path else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        raise BuildError("nvcc is not installed (CUDA_HOME, PATH)")
    return found


def command(output, archs=ARCHS, extra=()):
    """The compiler's command line."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{min(archs)},code=compute_{min(archs)}")
    return [find_nvcc(), *FLAGS, *codes, "--threads=2", *extra, "-o", str(output), str(source_folder() / "api.cu")]


def compile_to(output, archs=ARCHS, extra=()):
    """Compile csrc/ to `output`.

    Returns:
        what the compiler printed.
    Raises:
        BuildError: no nvcc, or it fails.
    """
    done = subprocess.run(command(output, archs, extra), capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"nvcc failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout + done.stderr


def cached(arch):
    """The library for one architecture, compiled on the first call on this machine and kept.

    The folder is $SURGERY_CACHE or ~/.cache/surgery_kernels; the key is the sources, the compiler and `arch`. Two
    processes at once compile once.
    """
    version = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256(f"{version}{FLAGS}{arch}".encode())
    for path in sorted(source_folder().iterdir()):
        if path.suffix in (".cu", ".cuh", ".h"):
            key.update(path.read_bytes())
    root = Path(os.environ.get("SURGERY_CACHE") or Path.home() / ".cache" / "surgery_kernels")
    folder = root / f"sink-sm{arch}-{key.hexdigest()[:16]}"
    library = folder / NAME
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    compile_to(Path(scratch) / NAME, (arch,))
                    os.replace(Path(scratch) / NAME, library)
    except OSError as failure:
        raise BuildError(f"cannot write to {folder}: {failure}") from failure
    return library
