"""The answer file: answers of a model to prompts, written batch by batch, continued after a kill.

The first line says how the answers were made; continuing with other settings is refused. The file holds texts and
belongs to the user: nothing else here keeps them.
"""

import json
from pathlib import Path

from ..generate import generate_answers


def answer_prompts(
    model,
    tokenizer,
    prompts,
    path,
    settings,
    max_new_tokens=512,
    batch_size=8,
    template="chat",
    system=None,
    progress=False,
):
    """Answer the prompts that `path` does not hold yet, and return all answers.

    Args:
        model, tokenizer: of the model asked.
        prompts: list of Prompt.
        path: the JSON lines file, made if needed.
        settings: JSON dict that tells runs apart (the model's name, say); the generation options are added.
        max_new_tokens, batch_size, template, system: see `generate.generate_answers`; greedy.
    Returns:
        list of str in the order of the prompts.
    Raises:
        ValueError: the file was made with other settings or for another prompt under the same id.
    """
    path = Path(path)
    settings = {**settings, "max_new_tokens": max_new_tokens, "template": template, "system": system}
    done = read_answers(path, prompts, settings)
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
    # longest first: the largest batch comes first, and out of memory shows at once
    missing = sorted((p for p in prompts if p.id not in done), key=lambda p: -len(p.text))
    steps = range(0, len(missing), batch_size)
    if progress:
        from tqdm.auto import tqdm

        steps = tqdm(steps, desc=path.stem, unit="batch")
    for start in steps:
        batch = missing[start : start + batch_size]
        answers = generate_answers(
            model, tokenizer, [p.text for p in batch], max_new_tokens, batch_size, system, template=template
        )
        with open(path, "a", encoding="utf-8") as file:
            for prompt, answer in zip(batch, answers, strict=True):
                line = {"id": prompt.id, "digest": prompt.digest, "prompt": prompt.text, "response": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                done[prompt.id] = answer
    return [done[prompt.id] for prompt in prompts]


def read_answers(path, prompts, settings=None):
    """Answers that a file holds for these prompts.

    A last line cut short by a kill is dropped from the file.

    Args:
        path: as `answer_prompts` writes it; a missing file holds none.
        prompts: list of Prompt.
        settings: what the first line must say, None to take it as it is.
    Returns:
        dict id -> answer.
    Raises:
        ValueError: a malformed line, other settings, another prompt under the same id.
    """
    path = Path(path)
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines.pop():
        # no newline at the end: the line was cut in the middle
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {number}: not JSON: {error.msg}") from None
    if not parsed:
        return {}
    if "settings" not in parsed[0]:
        raise ValueError(f"{path.name}, line 1: not an answer file of surgery eval: it must hold the settings")
    if settings is not None and parsed[0]["settings"] != settings:
        raise ValueError(
            f"{path.name}: was made with {parsed[0]['settings']}, now {settings}; choose another --output or delete it"
        )
    digests = {prompt.id: prompt.digest for prompt in prompts}
    answers = {}
    for line in parsed[1:]:
        if line["id"] in digests:
            if line["digest"] != digests[line["id"]]:
                raise ValueError(f"{path.name}: {line['id']} is the answer to another prompt; the prompt file changed")
            answers[line["id"]] = line["response"]
    return answers
