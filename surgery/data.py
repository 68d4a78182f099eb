"""Text rows in, token batches out: probe data, and the task data of `surgery train`.

A row is a mapping with `prompt` and `response`, or `messages` (role and content, the last one the assistant's), or
`text` alone. Sources are JSON lines files, Hugging Face data set ids and any iterable of rows.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch


class Encoded(NamedTuple):
    """One tokenised row: `input_ids`, and the index at which the response starts (0 for plain text)."""

    input_ids: list
    response_start: int


def read_rows(source, limit=None):
    """Read rows from a JSON lines file, a Hugging Face data set ("name" or "name:split"), or an iterable.

    Args:
        source: path, data set id, or iterable of mappings.
        limit: at most so many rows, None for all.
    Returns:
        list of dicts.
    Raises:
        ValueError: no such file or data set, an empty source, a malformed row (its line number is named).
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_file():
            rows = _read_json_lines(path, limit)
            return rows
        if path.suffix in (".jsonl", ".json") or path.is_dir():
            raise ValueError(f"{source}: no such file; give a JSON lines file or a Hugging Face data set id")
        rows, name = _read_hub(str(source)), str(source)
    else:
        rows, name = source, "rows"
    checked = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(checked) == limit:
            break
        checked.append(_check_row(row, f"{name}, row {number}"))
    if not checked:
        raise ValueError(f"{name}: no rows")
    return checked


def _read_json_lines(path, limit):
    rows = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
            rows.append(_check_row(row, where))
    if not rows:
        raise ValueError(f"{path.name}: the file holds no rows")
    return rows


def _read_hub(name):
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f'{name}: no such file; a data set id needs pip install "attention-surgery[train]"') from None
    dataset, _, split = name.partition(":")
    try:
        return load_dataset(dataset, split=split or "train")
    except Exception as error:
        raise ValueError(f"{name}: neither a file nor a data set that can be loaded: {error}") from error


def _check_row(row, where):
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {type(row).__name__}")
    if "messages" in row:
        messages = row["messages"]
        wanted = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not wanted or any(not isinstance(m.get("content"), str) or "role" not in m for m in messages):
            raise ValueError(f"{where}: messages must be a list of objects with role and content")
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the last message must be the assistant's, got {messages[-1]['role']!r}")
        return row
    keys = ("prompt", "response") if "prompt" in row or "response" in row else ("text",)
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(
                f"{where}: needs non-empty prompt and response, messages, or text; {key} is missing or empty"
            )
    return row


def rows_hash(rows):
    """sha256 of rows as canonical JSON: what the run manifest records of a data set."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


class RowEncoder:
    """Rows to token ids.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: rows are cut there, on the right.
        chat: format prompt and response with the chat template; False: prompt, newline, response.
        double_bos: tokenise the formatted text with special tokens once more, as the released code does.
    Raises:
        ValueError: chat, and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer, max_length, chat=True, double_bos=False):
        if chat and not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(
                f"tokenizer {name!r} has no chat template: give a chat model's tokenizer, set "
                f"tokenizer.chat_template, or format rows as plain text (chat=False)"
            )
        self.tokenizer, self.max_length, self.chat, self.double_bos = tokenizer, max_length, chat, double_bos

    def encode(self, row):
        """Encoded ids of one row, cut at max_length."""
        prompt, whole = self._texts(row)
        ids = self._ids(whole)
        start = 0
        if prompt is not None:
            # the longest common prefix: a tokenizer may merge the last prompt token with the first of the response
            for start, (a, b) in enumerate(zip(self._ids(prompt), ids, strict=False)):  # noqa: B007
                if a != b:
                    break
            else:
                start += 1
        return Encoded(ids[: self.max_length], min(start, self.max_length))

    def _ids(self, text):
        special = self.double_bos if self.chat else True
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _texts(self, row):
        """(text up to the response or None, whole text)."""
        if "text" in row and "prompt" not in row and "messages" not in row:
            return None, row["text"]
        if not self.chat:
            messages = row.get("messages")
            prompt = "\n".join(m["content"] for m in messages[:-1]) if messages else row["prompt"]
            response = messages[-1]["content"] if messages else row["response"]
            return prompt + "\n", prompt + "\n" + response
        messages = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        template = self.tokenizer.apply_chat_template
        return (
            template(messages[:-1], tokenize=False, add_generation_prompt=True),
            template(messages, tokenize=False),
        )


def collate(encoded, pad_id, with_row_mask):
    """Right-padded batch of Encoded rows.

    Returns:
        dict of input_ids, attention_mask and, if asked for, row_mask (true on response tokens), each [B, T].
    """
    length = max(len(one.input_ids) for one in encoded)
    batch = {
        "input_ids": torch.full((len(encoded), length), pad_id, dtype=torch.long),
        "attention_mask": torch.zeros(len(encoded), length, dtype=torch.long),
    }
    if with_row_mask:
        batch["row_mask"] = torch.zeros(len(encoded), length, dtype=torch.bool)
    for row, one in enumerate(encoded):
        batch["input_ids"][row, : len(one.input_ids)] = torch.tensor(one.input_ids)
        batch["attention_mask"][row, : len(one.input_ids)] = 1
        if with_row_mask:
            batch["row_mask"][row, one.response_start : len(one.input_ids)] = True
    return batch


def encode_rows(rows, encoder, config, name):
    """Encode probe rows and check that each leaves query rows to average.

    Args:
        rows: list of rows.
        encoder: RowEncoder.
        config: SurgeryConfig, for its `rows` policy.
        name: how errors call the rows.
    Raises:
        ValueError: a row that leaves nothing after truncation (its number is named).
    """
    encoded = [encoder.encode(row) for row in rows]
    for number, one in enumerate(encoded, 1):
        counted = len(one.input_ids) - max(one.response_start if config.rows == "response" else 0, 1)
        if counted < 1:
            what = "response token" if config.rows == "response" else "token besides the first"
            raise ValueError(
                f"{name}, row {number}: no {what} is left of {len(one.input_ids)} tokens after truncation to "
                f"max_length={encoder.max_length}"
            )
    return encoded


class ProbeData:
    """Harmful and refusal sequences, and which of them each optimizer step takes.

    The order is a function of config.seed and of the pair's number in the whole run alone, in shuffled passes over
    each side: it does not touch torch's or Python's random state, and ranks take consecutive pairs of it. A run
    resumed on another number of ranks goes on behind the pairs that were used (`resume`).

    Args:
        harmful, refusal: sources, see `read_rows`.
        tokenizer: with a chat template unless config.chat is false.
        config: SurgeryConfig.
        rank, world_size: among data-parallel ranks, which take different rows.
    Raises:
        ValueError: bad data, see `read_rows` and `encode_rows`.
    """

    def __init__(self, harmful, refusal, tokenizer, config, rank=0, world_size=1):
        encoder = RowEncoder(tokenizer, config.max_length, config.chat, config.double_bos)
        self.config, self.rank, self.world_size = config, rank, world_size
        self._first_step = self._first_pair = 0
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.hashes, self._encoded = {}, {}
        for name, source in (("harmful", harmful), ("refusal", refusal)):
            rows = read_rows(source)
            self.hashes[name] = rows_hash(rows)
            self._encoded[name] = encode_rows(rows, encoder, config, f"{name} probe rows")

    def used(self, step):
        """Pairs that all ranks have used before optimizer step `step`."""
        return self._first_pair + (step - self._first_step) * self.world_size * self.config.pairs_per_step

    def resume(self, step, used):
        """Go on at `step` behind `used` pairs, whatever number of ranks used them."""
        self._first_step, self._first_pair = step, used

    def batches(self, step):
        """(harmful, refusal) batches of optimizer step `step` (counted from 0), as `SurgeryRegularizer` takes them."""
        return tuple(
            collate(
                [self._encoded[name][i] for i in self.indices(name, step)], self.pad_id, self.config.rows == "response"
            )
            for name in ("harmful", "refusal")
        )

    def indices(self, name, step):
        """Row numbers of one side for `step`."""
        size, count = len(self._encoded[name]), self.config.pairs_per_step
        start = self.used(step) + self.rank * count
        return [self._order(name, (start + i) // size)[(start + i) % size] for i in range(count)]

    def _order(self, name, epoch):
        order = list(range(len(self._encoded[name])))
        random.Random(f"{self.config.seed}-{name}-{epoch}").shuffle(order)
        return order


def task_examples(rows, encoder):
    """Tokenised task rows for Trainer, loss on the response only.

    Returns:
        list of dicts input_ids, attention_mask, labels (-100 on the prompt).
    Raises:
        ValueError: no row has a response token left after truncation.
    """
    examples = []
    for row in rows:
        ids, start = encoder.encode(row)
        if start < len(ids):
            labels = [-100] * start + ids[start:]
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not examples:
        raise ValueError(f"no task row has a response token within max_length={encoder.max_length}")
    return examples
