"""Task accuracy through lm-eval, on local files: GSM8K, SST-2 and AG News. Zero-shot, greedy, in the chat template."""

from importlib.resources import files
from pathlib import Path

TASKS = ("gsm8k", "sst2", "agnews")


def task_records(model, tokenizer, sources, limit=None, batch_size=8, max_new_tokens=512):
    """Which rows a model answers correctly, by exact match.

    Args:
        model, tokenizer: as loaded; the tokenizer's chat template is used if it has one.
        sources: dict task -> JSON lines file: the data set's own columns, or prompt and response.
        limit: at most so many rows of each.
        max_new_tokens: longest answer; SST-2 and AG News need 8.
    Returns:
        dict task -> records as scores.py takes them, with `correct` (bool), in the order of the rows.
    Raises:
        ValueError: unknown task, no such file, lm-eval not installed.
    """
    unknown = sorted(set(sources) - set(TASKS))
    if unknown:
        raise ValueError(f"unknown tasks {unknown}; known: {', '.join(TASKS)}")
    for source in sources.values():
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError('task accuracy needs lm-eval: pip install "attention-surgery[eval]"') from None
    was_training = model.training
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            model=language_model,
            tasks=[_task(name, source, max_new_tokens) for name, source in sources.items()],
            # without the hundreds of tasks that come with lm-eval: indexing them takes seconds
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=bool(getattr(tokenizer, "chat_template", None)),
            verbosity="WARNING",
        )
    finally:
        model.train(was_training)
    samples = {name: found["samples"][f"surgery_{name}"] for name in sources}
    return {
        name: [_record(name, one) for one in sorted(given, key=lambda one: one["doc_id"])]
        for name, given in samples.items()
    }


def _record(name, sample):
    return {
        "id": f"{name}-{sample['doc_id'] + 1}",
        "digest": sample["doc_hash"][:12],
        "expect": "task",
        "correct": bool(sample["exact_match"]),
        "score": None,
        "judged": True,
    }


def _task(name, source, max_new_tokens):
    import yaml

    task = yaml.safe_load((files(__package__) / "tasks" / f"{name}.yaml").read_text(encoding="utf-8"))
    options = task["generation_kwargs"]
    options["max_gen_toks"] = min(options["max_gen_toks"], max_new_tokens)
    return task | {"dataset_kwargs": {"data_files": {"test": str(Path(source).resolve())}}}
