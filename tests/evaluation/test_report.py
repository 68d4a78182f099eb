"""The HTML report: self-contained, escaped, and readable by a headless browser where there is one."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny import rows, tiny_model, tiny_tokenizer

from surgery.cli.main import main
from surgery.report import figure, html_page, paragraph, table

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser")
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00\x1f\x15\xc4\x89"
    b"\x00\x00\x00\rIDATx\x9cc\xf8\xcf\xc0\xf0\x1f\x00\x05\x00\x01\xff\x89\x99=\x1d\x00\x00\x00\x00IEND\xaeB`\x82"
)


class Page(HTMLParser):
    """Balanced tags, every src and href, and the text inside the script called `data`."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.data, self.tags = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", "data"):
            self.data += data


def test_page_escapes_everything(tmp_path):
    (tmp_path / "f.png").write_bytes(PIXEL)
    nasty = "</script><img src=http://x/>&<b>"
    text = html_page(
        nasty,
        [(nasty, [paragraph(nasty), table((nasty,), [(nasty,), (1.23456,)]), figure(tmp_path / "f.png", nasty)])],
        {"key": nasty},
    )
    page = Page(text)
    assert page.tags.count("img") == 1 and "b" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert json.loads(page.data) == {"key": nasty}
    assert "1.235" in text


def test_figure_rejects_other_files(tmp_path):
    with pytest.raises(ValueError, match=r"got 'x\.txt'"):
        figure(tmp_path / "x.txt", "")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """`surgery measure` on a tiny model, its earlier checkpoint and a run; the prompts hold a secret word."""
    folder = tmp_path_factory.mktemp("report")
    tokenizer = tiny_tokenizer()
    for name, seed in (("before", 0), ("after", 1)):
        tiny_model(attention="sdpa", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for i, name in enumerate(("harmful", "refusal", "safe")):
        texts = [{**row, "prompt": row["prompt"] + " SECRETWORD"} for row in rows(14, i, response_words=5 + i)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "run").mkdir()
    generator = np.random.default_rng(0)
    lines = [
        {
            "step": step,
            "mean_relu_divergence": 0.1 / step,
            "positive_heads": 12 - step,
            "divergence": generator.normal(size=(3, 4)).tolist(),
        }
        for step in range(1, 12)
    ]
    (folder / "run" / "surgery_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [x for name in ("harmful", "refusal", "safe") for x in (f"--{name}", str(folder / f"{name}.jsonl"))]
    first = ["measure", "--model", str(folder / "before"), *flags, "--output", str(folder / "first"), "--json"]
    assert main(first) == 0
    second = ["measure", "--model", str(folder / "after"), *flags, "--output", str(folder / "second"), "--json"]
    second += ["--before", str(folder / "first" / "measurement.npz"), "--runs", str(folder / "run")]
    assert main(second) == 0
    return folder


def test_report_is_self_contained_and_without_texts(measured):
    text = (measured / "second" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 7 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "http" not in text.replace("data:image", "") and "SECRETWORD" not in text and str(measured) not in text
    data = json.loads(page.data)
    summary = data["summary"]
    assert summary["heads"] == 12 and len(data["heads"]["rows"]) == 12
    titles = set(summary["contrasts"])
    assert {"harmful - refusal", "harmful - safe", "harmful - refusal, after - before"} <= titles
    assert {"harmful - refusal, length-matched", "null: harmful - harmful, one split"} <= titles
    assert summary["null"]["sequences"] == [7, 7]


def test_numbers_of_the_files_agree(measured):
    import csv

    folder = measured / "second"
    with open(folder / "divergence.csv") as file:
        lines = list(csv.DictReader(file))
    arrays = np.load(folder / "measurement.npz")
    d = arrays["harmful"].mean(1) - arrays["refusal"].mean(1)
    np.testing.assert_allclose([float(line["divergence"]) for line in lines], d.ravel(), rtol=1e-4, atol=1e-7)
    entropy = [float(line["entropy_harmful"]) for line in lines]
    np.testing.assert_allclose(entropy, arrays["harmful_entropy"].mean(1).ravel(), rtol=1e-4)
    assert all(float(line["low"]) <= float(line["divergence"]) <= float(line["high"]) for line in lines)
    summary = json.loads((folder / "measurement.json").read_text())["summary"]
    counts = summary["contrasts"]["harmful - refusal"]
    significant = [line for line in lines if float(line["p"]) < 0.05]
    assert counts["significant_positive"] == sum(float(line["divergence"]) > 0 for line in significant)
    before = np.load(measured / "first" / "measurement.npz")
    change = [arrays[name] - before[name] for name in ("harmful", "refusal")]
    moved = summary["contrasts"]["harmful - refusal, after - before"]
    assert moved["positive"] == int(((change[0].mean(1) - change[1].mean(1)) > 0).sum())


def test_before_must_be_of_the_same_rows(measured, capsys):
    files = [x for name in ("refusal", "safe") for x in (f"--{name}", str(measured / f"{name}.jsonl"))]
    flags = ["measure", "--model", str(measured / "after"), "--harmful", str(measured / "safe.jsonl"), *files]
    assert main([*flags, "--before", str(measured / "first" / "measurement.npz")]) == 2
    assert "measured with another data" in capsys.readouterr().err


def test_before_may_be_a_model_and_rows_may_be_paired(measured, capsys):
    files = [x for name in ("harmful", "refusal") for x in (f"--{name}", str(measured / f"{name}.jsonl"))]
    flags = ["measure", "--model", str(measured / "after"), *files, "--paired", "--json"]
    capsys.readouterr()
    assert main([*flags, "--before", str(measured / "after")]) == 0
    contrasts = json.loads(capsys.readouterr().out)["contrasts"]
    assert contrasts["harmful - refusal"]["paired"]
    moved = contrasts["harmful - refusal, after - before"]
    assert (moved["positive"], moved["negative"]) == (0, 0)


@pytest.mark.parametrize("more", (["--level", "0.9"], ["--resamples", "5"], ["--length-tolerance", "-1"]))
def test_measure_rejects_options(measured, capsys, more):
    files = [x for name in ("harmful", "refusal") for x in (f"--{name}", str(measured / f"{name}.jsonl"))]
    assert main(["measure", "--model", str(measured / "after"), *files, *more]) == 2
    assert "must be" in capsys.readouterr().err


def test_a_browser_renders_and_sorts_the_report(measured, tmp_path):
    """The page's own script runs: a click on a column's head sorts, and the screenshot is not empty."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no headless browser")
    click = """<script>
    const table = [...document.querySelectorAll("table")].find(t => t.textContent.includes("standard_error"));
    table.querySelectorAll("thead th")[2].click();
    const values = [...table.tBodies[0].rows].map(r => Number(r.cells[2].textContent));
    document.title = "sorted:" + values.every((v, i) => i === 0 || values[i - 1] >= v) + ":" + values.length
        + ":" + [...document.images].every(image => image.complete && image.naturalWidth > 50);
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text((measured / "second" / "report.html").read_text().replace("</body>", click))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>sorted:true:12:true</title>" in done.stdout, done.stderr[-2000:]
