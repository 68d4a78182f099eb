"""Wheel and sdist hold what they should and nothing else, and live next to Hugging Face's package `kernels`."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from a copy so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("dist")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    # sdist first, then the wheel out of the sdist: what PyPI's users get
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source"))
    (wheel,), (sdist,) = ((folder / "dist").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


def test_wheel_contents(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"surgery", "surgery_kernels"}
    for wanted in (
        "surgery_kernels/backends/cpu/aten.py",
        "surgery_kernels/stats/sink_mass.py",
        "surgery/cli/main.py",
        "surgery/demo_data/tasks.jsonl",
        "surgery/evaluation/templates/harmbench.txt",
        "surgery/evaluation/tasks/gsm8k.yaml",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_packages(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "README.md", "LICENSE", "kernels/surgery_kernels/api.py", "surgery/rows.py"} <= names
    assert "kernels/__init__.py" not in names


def test_installed_wheel_works_next_to_hugging_face_kernels(built, tmp_path):
    """In the installed tree and from the checkout's root, `import kernels` is Hugging Face's."""
    pytest.importorskip("kernels")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), str(built[0]))
    code = (
        "import kernels, sys; assert kernels.CUDAProperties, kernels.__file__\n"
        "from transformers.models.llama import modeling_llama\n"
        "import surgery, surgery_kernels; print(surgery.__file__); print(surgery_kernels.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = run(sys.executable, "-c", code, env=environment, cwd=tmp_path).split()
    assert all(path.startswith(str(tmp_path)) for path in found)
    run(sys.executable, "-c", code, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT)
