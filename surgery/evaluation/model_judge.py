"""What model-based judges share: loading, left-padded batches, greedy continuations, templates."""

import re
from abc import ABC, abstractmethod
from importlib.resources import files
from pathlib import Path

import torch

from ..models import load_model, pick_device


class ModelJudge(ABC):
    """A judge that runs a causal language model on a text made of the exchange.

    A subclass gives `name`, and `verdict(exchange, output)`; `fields(exchange)` and TEMPLATES where it has a prompt.

    Args:
        model, tokenizer: of the judge.
        batch_size: texts a forward.
        template: path of a text file for every exchange in the place of the published prompt.
    """

    name = None
    # files under templates/: without and with a context
    TEMPLATES = (None, None)
    MAX_NEW_TOKENS = 16
    # the answer is cut there, in the judge's own tokens; None: never
    MAX_ANSWER_TOKENS = None

    def __init__(self, model, tokenizer, batch_size=8, template=None):
        if template is not None and self.TEMPLATES[0] is None:
            raise ValueError(f"the judge {self.name} takes no template: its tokenizer's chat template holds the prompt")
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.templates = [read_template(x) for x in ((template, None) if template else self.TEMPLATES)]

    @classmethod
    def load(cls, name, batch_size=8, dtype="float32", template=None):
        """Load the judge's model from a folder or the hub onto the GPU, if there is one."""
        model, tokenizer = load_model(name, dtype)
        return cls(model.to(pick_device()), tokenizer, batch_size, template)

    def judge(self, exchanges):
        """list of Exchange -> list of Verdict."""
        verdicts = []
        for start in range(0, len(exchanges), self.batch_size):
            batch = exchanges[start : start + self.batch_size]
            outputs = self.read([self.text(one) for one in batch])
            verdicts += [self.verdict(one, output) for one, output in zip(batch, outputs, strict=True)]
        return verdicts

    def text(self, exchange):
        """What the model reads."""
        plain, contextual = self.templates
        answer = self.cut(exchange.answer)
        if contextual is not None and exchange.context is not None:
            return fill(contextual, prompt=exchange.behavior, response=answer, context=exchange.context)
        return fill(plain, prompt=exchange.request, response=answer)

    def cut(self, answer):
        """The answer, cut at MAX_ANSWER_TOKENS."""
        if self.MAX_ANSWER_TOKENS is None:
            return answer
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return answer if len(ids) <= self.MAX_ANSWER_TOKENS else self.tokenizer.decode(ids[: self.MAX_ANSWER_TOKENS])

    def ids(self, text):
        """Token ids of `text`; the tokenizer adds its first token unless the text has it."""
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def read(self, texts):
        """Greedy continuations of `texts`, without special tokens."""
        input_ids, mask = self.padded(texts)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=self.MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self._pad_id(),
            )
        return self.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)

    def padded(self, texts):
        """(input_ids, attention_mask) int64 [B, T], padded on the left."""
        rows = [self.ids(text) for text in texts]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self._pad_id())
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            input_ids[i, length - len(row) :] = torch.tensor(row)
            mask[i, length - len(row) :] = 1
        return input_ids.to(self.model.device), mask.to(self.model.device)

    def _pad_id(self):
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    @abstractmethod
    def verdict(self, exchange, output):
        """Verdict out of the model's output."""


def read_template(source):
    """Text of templates/SOURCE.txt, or of the user's own file.

    Raises:
        ValueError: no such file, or it lacks {prompt} or {response}.
    """
    if source is None:
        return None
    own = files(__package__) / "templates" / f"{source}.txt"
    path = own if own.is_file() else Path(source)
    if not path.is_file():
        raise ValueError(f"{source}: no such template file")
    # bytes: universal newlines would change what the judge was trained on
    text = path.read_bytes().decode("utf-8")
    missing = [name for name in ("{prompt}", "{response}") if name not in text]
    if missing:
        raise ValueError(f"{path.name}: a template needs {' and '.join(missing)}")
    return text


def fill(template, **values):
    """Put values in the place of {name}. Braces inside the values stay as they are."""
    return re.sub("{(" + "|".join(values) + ")}", lambda found: values[found[1]], template)
