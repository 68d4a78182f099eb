"""Figures from committed CSVs, and only from those."""

import shutil
import subprocess

import pytest

from bench import memory, plot, run

IDENTITY = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), *IDENTITY, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A repository with a CSV of each tool."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--device", "cpu", "--shapes", "tiny", "--dtype", "float32"]
    with pytest.MonkeyPatch.context() as patch:
        for tool in (run, memory):
            patch.setattr(tool, "limit_memory", lambda: None)
        run.main([*common, "--lengths", "16,32", "--repetitions", "2", "--csv", str(folder / "run.csv")])
        lengths = ["--lengths", "16,32,64,128", "--impls", "ours_cpu,paper"]
        memory.main([*common, *lengths, "--csv", str(folder / "memory.csv")])
    shutil.copy(plot.RESULTS / "cpu" / "train_step.csv", folder)
    shutil.copy(plot.RESULTS / "cpu" / "gsm8k_poisoned" / "curves.csv", folder)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "results")
    return folder


def test_every_figure_is_drawn_and_the_same_each_time(results):
    names = ("run.png", "memory.png", "train_step.png", "mean_relu_divergence.png", "positive_heads.png")
    assert plot.main(["--results", str(results)]) == 0
    first = {name: (results / name).read_bytes() for name in names}
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in first.values())
    assert plot.main(["--results", str(results)]) == 0
    for name, image in first.items():
        assert (results / name).read_bytes() == image, name


def test_other_csvs_are_refused(results, capsys):
    path = results / "memory.csv"
    committed = path.read_text()
    try:
        path.write_text(committed.replace("ours_cpu,", "better_cpu,"))
        assert plot.main(["--results", str(results)]) == 1
        assert "memory.csv: changed since the last commit" in capsys.readouterr().out
        assert plot.main(["--results", str(results), "--uncommitted"]) == 0
        capsys.readouterr()
    finally:
        path.write_text(committed)
    new = results / "gpu"
    new.mkdir()
    shutil.copy(path, new)
    assert plot.main(["--results", str(results)]) == 1
    assert "not committed" in capsys.readouterr().out
    assert not (new / "memory.png").exists()
    shutil.rmtree(new)


def test_nothing_to_draw(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main(["--results", str(tmp_path)])
    assert "holds none of run.csv, memory.csv" in capsys.readouterr().err


def test_the_repository_has_every_figure_of_its_csvs():
    missing = [str(figure.relative_to(plot.RESULTS)) for _, figure, _ in plot.figures() if not figure.exists()]
    assert missing == []
