"""Rows to batches: reading, formatting, response masks, the probe order, and errors that name the line."""

import json

import pytest
import torch
from tiny import rows, tiny_tokenizer

from surgery import SurgeryConfig
from surgery.data import ProbeData, RowEncoder, collate, read_rows, rows_hash, task_examples


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


GOOD = {"prompt": "w1", "response": "w2 w3"}


@pytest.mark.parametrize(
    ("lines", "message"),
    (
        ([GOOD, "{oops"], r"rows.jsonl, line 2: not JSON"),
        ([GOOD, "", {"prompt": "w1"}], r"line 3: needs .*response is missing or empty"),
        ([{"prompt": "w1", "response": "  "}], r"line 1: .*response is missing"),
        ([[1, 2]], r"line 1: a row must be an object, got list"),
        ([{"text": 3}], r"line 1: .*text is missing"),
        ([{"messages": [{"role": "user", "content": "w1"}]}], r"line 1: the last message must be the assistant's"),
        ([{"messages": "w1"}], r"line 1: messages must be a list"),
        ([""], r"rows.jsonl: the file holds no rows"),
    ),
    ids=("json", "missing", "blank", "list", "text", "role", "messages", "empty"),
)
def test_malformed_files(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "rows.jsonl", *lines))


def test_missing_file_and_empty_iterable(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="rows: no rows"):
        read_rows([])
    with pytest.raises(ValueError, match="rows, row 2: a row must be an object"):
        read_rows([GOOD, "text"])


def test_limit_and_hash(tmp_path):
    many = rows(5, seed=0)
    path = write(tmp_path / "rows.jsonl", *many)
    assert read_rows(path) == many == read_rows(iter(many))
    assert read_rows(path, limit=2) == many[:2] == read_rows(many, limit=2)
    assert rows_hash(many) != rows_hash(many[:4]) and rows_hash(many) == rows_hash(read_rows(path))


def test_data_set_from_disk_like_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list(rows(3, seed=1))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows("org/name:test") == rows(3, seed=1)
    assert asked == [("org/name", "test")]


def test_chat_format_and_response_start():
    tokenizer = tiny_tokenizer()
    encoded = RowEncoder(tokenizer, 64).encode({"prompt": "w1 w2", "response": "w3 w4 w5"})
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert words == ["<s>", "<user>", "w1", "w2", "</s>", "<assistant>", "w3", "w4", "w5", "</s>"]
    assert words[encoded.response_start] == "w3"
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    assert RowEncoder(tokenizer, 64).encode({"messages": messages}) == encoded


def test_plain_text_and_double_bos():
    tokenizer = tiny_tokenizer()
    plain = RowEncoder(tokenizer, 64, chat=False).encode(GOOD)
    assert tokenizer.convert_ids_to_tokens(plain.input_ids) == ["<s>", "w1", "w2", "w3"]
    assert plain.response_start == 2
    assert RowEncoder(tokenizer, 64).encode({"text": "w1 w2"}).response_start == 0
    doubled = RowEncoder(tokenizer, 64, double_bos=True).encode(GOOD)
    assert tokenizer.convert_ids_to_tokens(doubled.input_ids)[:3] == ["<s>", "<s>", "<user>"]
    assert tokenizer.convert_ids_to_tokens(doubled.input_ids)[doubled.response_start] == "w2"


def test_no_chat_template():
    with pytest.raises(ValueError, match="has no chat template"):
        RowEncoder(tiny_tokenizer(chat_template=None), 64)


def test_collate_pads_on_the_right_and_marks_the_response():
    encoder = RowEncoder(tiny_tokenizer(), 64)
    batch = collate([encoder.encode(row) for row in rows(3, seed=2)], pad_id=0, with_row_mask=True)
    for i, row in enumerate(rows(3, seed=2)):
        ids = batch["input_ids"][i][batch["row_mask"][i]]
        assert encoder.tokenizer.decode(ids, skip_special_tokens=True) == row["response"]
        n = int(batch["attention_mask"][i].sum())
        assert batch["attention_mask"][i, :n].all() and not batch["row_mask"][i, n:].any()
        assert not batch["input_ids"][i, n:].any()


@pytest.mark.parametrize(("policy", "length"), (("response", 6), ("non_sink", 2)))
def test_truncation_that_leaves_nothing(policy, length):
    config = SurgeryConfig(rows=policy, max_length=length)
    harmful = [{"prompt": "w1", "response": "w2"}, {"prompt": "w1 w2 w3 w4", "response": "w5"}]
    if policy == "non_sink":
        ProbeData(harmful, rows(2, seed=0), tiny_tokenizer(), config)
        return
    with pytest.raises(ValueError, match=r"harmful probe rows, row 2: no response token is left .*max_length=6"):
        ProbeData(harmful, rows(2, seed=0), tiny_tokenizer(), config)


def test_one_token_row_is_refused():
    config = SurgeryConfig(chat=False)
    with pytest.raises(ValueError, match="row 1: no token besides the first is left"):
        ProbeData([{"text": " . "}], rows(2, seed=0), _bare_tokenizer(), config)


def _bare_tokenizer():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


def test_probe_order_is_a_function_of_seed_and_step():
    def order(seed=1, **ranks):
        config = SurgeryConfig(seed=seed, pairs_per_step=2)
        data = ProbeData(rows(7, seed=0), rows(5, seed=1), tiny_tokenizer(), config, **ranks)
        return [[data.indices(name, step) for step in range(20)] for name in ("harmful", "refusal")]

    torch.manual_seed(0)
    first = order()
    torch.manual_seed(1)
    assert order() == first
    assert order(seed=2) != first
    # seven rows, two a step: every pass takes each row once
    flat = [i for step in first[0] for i in step]
    assert sorted(flat[:7]) == sorted(flat[7:14]) == list(range(7))
    # ranks share one pass over the rows
    two = [order(rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert two[0][0] + two[1][0] == flat[:4]


def test_task_examples_learn_the_response_only():
    encoder = RowEncoder(tiny_tokenizer(), 12)
    examples = task_examples([GOOD, {"prompt": " ".join(["w1"] * 20), "response": "w2"}], encoder)
    assert len(examples) == 1
    labels = examples[0]["labels"]
    assert encoder.tokenizer.decode([x for x in labels if x != -100]) == "w2 w3 </s>"
    with pytest.raises(ValueError, match="no task row has a response token within max_length=12"):
        task_examples([{"prompt": " ".join(["w1"] * 20), "response": "w2"}], encoder)
