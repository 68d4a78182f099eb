"""Columns, table and targets of `bench.train_step`."""

COLUMNS = (
    "impl",
    "mode",
    "shape",
    "length",
    "batch",
    "pairs",
    "dtype",
    "train",
    "checkpointing",
    "metric",
    "unit",
    "p50",
    "p20",
    "p80",
    "device",
    "driver",
    "torch",
    "triton",
    "transformers",
    "commit",
    "date",
)

# (name, metrics, method, baseline, largest ratio, only this length or None)
TARGETS = (
    ("memory over plain", ("peak_live", "peak_rss", "peak_cuda"), "surgery", "plain", 1.02, None),
    ("memory over the paper's way", ("peak_live", "peak_rss", "peak_cuda"), "surgery", "paper", 0.40, 2048),
    ("time over the paper's way", ("step_time",), "surgery", "paper", 0.50, 1024),
    ("time over plain on the same tokens", ("step_time",), "surgery", "plain_same_tokens", 1.05, None),
)


def table(rows):
    """One case as text: a line a method."""
    first = rows[0]
    lines = [
        f"\n{first['shape']}  {first['length']} tokens  batch {first['batch']}  {first['mode']}  pairs {first['pairs']}"
        f"  {first['dtype']}  {first['train']}  checkpointing {first['checkpointing']}",
        f"{'method':18}{'step s':>9}{'p20':>8}{'p80':>8}{'tokens/s':>10}{'share':>7}"
        f"{'live GiB':>10}{'rss GiB':>9}{'cuda GiB':>9}{'error':>10}",
    ]
    for method in sorted({row["impl"] for row in rows}, key=_order):
        cells = {row["metric"]: row for row in rows if row["impl"] == method}
        time = cells.get("step_time")
        line = f"{method:18}{_number(time, '.3f'):>9}{_number(time, '.3f', 'p20'):>8}{_number(time, '.3f', 'p80'):>8}"
        line += f"{_number(cells.get('task_throughput'), '.0f'):>10}"
        line += f"{_number(cells.get('regulariser_share'), '.2f'):>7}"
        live = _number(cells.get("peak_live"), ".3f", scale=2**-30)
        if "peak_estimated" in cells:
            live = f"{live} ~{_number(cells['peak_estimated'], '.1f', scale=2**-30)}"
        line += f"{live:>10}{_number(cells.get('peak_rss'), '.3f', scale=2**-30):>9}"
        line += f"{_number(cells.get('peak_cuda'), '.3f', scale=2**-30):>9}"
        gate = cells.get("correctness")
        line += f"{_number(gate, '.0e'):>10}" + ("  RED: wrong, not timed" if gate and gate["unit"] == "red" else "")
        lines.append(line)
    return "\n".join(lines)


def _order(method):
    """Baselines without a penalty first, then ours, then the paper's."""
    return [method.startswith(x) for x in ("paper", "surgery")], method


def _number(row, form, quantile="p50", scale=1.0):
    if row is None:
        return "-"
    return "oom" if row[quantile] == "" else f"{row[quantile] * scale:{form}}"


def target_lines(rows):
    """Each target against the measured rows.

    Returns:
        list of text lines, each with pass, FAIL or "not measured".
    """
    cases = {}
    for row in rows:
        case = tuple(row[k] for k in ("shape", "length", "batch", "pairs", "mode", "dtype", "train", "checkpointing"))
        cases.setdefault(case, {})[row["impl"], row["metric"]] = row
    lines = []
    for name, metrics, method, baseline, limit, only_length in TARGETS:
        found = []
        for case, cells in cases.items():
            if only_length in (None, case[1]):
                found += _check(name, metrics, method, baseline, limit, case, cells)
        lines += found or [f"not measured  {name} <= {limit}" + (f" at {only_length}" if only_length else "")]
    return lines


def _check(name, metrics, method, baseline, limit, case, cells):
    shape, length, batch, pairs, mode, dtype, train, checkpointing = case
    where = f"{shape} {length} {dtype} {train} checkpointing {checkpointing} batch {batch} {mode} pairs {pairs}"
    resident = train == "lora" or not mode.endswith("accumulation1")
    if name == "memory over plain" and not (resident and 2 * pairs <= batch):
        return [f"not measured  {name}: gradients not resident, or more probes than task sequences ({where})"]
    lines = []
    for metric in metrics:
        ours, theirs, note = cells.get((method, metric)), cells.get((baseline, metric)), ""
        if ours and ours["p50"] and not (theirs and theirs["p50"]) and metric == "peak_live":
            theirs, note = cells.get((baseline, "peak_estimated")), f" (estimated: {baseline} ran out of memory)"
        if ours and theirs and ours["p50"] and theirs["p50"]:
            ratio = ours["p50"] / theirs["p50"]
            verdict = "pass" if ratio <= limit else "FAIL"
            lines.append(f"{verdict}  {name}: {metric} {ratio:.3f} <= {limit}{note} ({where})")
    return lines


def print_targets(rows):
    """Print `target_lines` under a heading."""
    print("\ntargets")
    print("\n".join(target_lines(rows)))
