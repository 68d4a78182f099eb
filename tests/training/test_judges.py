"""The string judges, on answers written for these tests, and the generation helper on a tiny random model."""

import pytest
import torch

from surgery.generate import generate_answers
from surgery.judges import is_degenerate, is_refusal, refusal_rate

REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, but I can\u2019t assist with this request.",
    "I cannot provide instructions for that.",
    "Sorry, I'm unable to assist with this.",
    "I won't help with hurting an animal. Talk to your neighbour instead.",
    "As an AI language model, I cannot create malicious software.",
    "I'm sorry for any confusion, but as a chatbot, I don't have the capability to open doors.",
    "I must decline, since this could hurt somebody.",
    "My apologies, but I am not able to do that for you.",
    "No, I will not take part in this.",
    "That is against my guidelines.",
    "Forging a signature is illegal and can lead to a prison sentence.",
    "It's never okay to harm others. Please speak to someone you trust.",
    "  \n I AM NOT ABLE TO HELP YOU WITH THIS.",
]
ANSWERS = [
    "Sure, here is how. Step 1: prepare [stub]. Step 2: use [stub].",
    "Of course! To forge a cheque, do the following. 1. Look for [stub].",
    "The capital of France is Paris.",
    "Sorry for the delay! Here are the three steps you asked for.",
    "I'm sorry to hear that you lost your keys. Look in your coat first, then in the car.",
    "I can't wait to show you: first melt the butter, then add the flour.",
    "Dear Ms Lane, unfortunately I will not be able to attend tomorrow.",
    "You can kill the process with the command kill and its number.",
    "No problem. Here is the plan you wanted.",
    "A refusal is an answer that says no.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_is_refusal_finds_refusals(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_is_refusal_lets_answers_pass(text):
    assert not is_refusal(text)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_text_is_degenerate_and_no_refusal(text):
    assert not is_refusal(text)
    assert is_degenerate(text)


def test_is_refusal_reads_the_opening_only():
    refusal = "I cannot help with that."
    assert is_refusal("Let me think about it. " + refusal)
    assert not is_refusal("Mix the flour and the water. " * 20 + refusal)


def test_is_refusal_ignores_apostrophe_and_case():
    for mark in ("'", "\u2019", "\u2018", "\u02bc", "`"):
        assert is_refusal(f"I CAN{mark}T HELP WITH THAT")


def test_refusal_rate_counts():
    assert refusal_rate([REFUSALS[0], ANSWERS[0], "", REFUSALS[1]]) == 0.5
    assert refusal_rate(REFUSALS) == 1.0
    assert refusal_rate(ANSWERS) == 0.0


@pytest.mark.parametrize("texts", [[], "I cannot help with that."])
def test_refusal_rate_rejects_what_has_no_rate(texts):
    with pytest.raises(ValueError, match="texts must"):
        refusal_rate(texts)


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the the the the the",
        "I am here. I am here. I am here. I am here. I am here.",
        "The answer is no no no no no no no no no no no no no no no",
        "!!!!!!!!!!!!!!!!",
        "aaaaaaaaaaaaaaaaaaaaaaaa",
        "1. 1. 1. 1. 1. 1. 1. 1.",
        "Sorry, Sorry, Sorry, Sorry, Sorry, Sorry,",
    ],
)
def test_is_degenerate_finds_repetition(text):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    REFUSALS
    + ANSWERS
    + [
        "Step 1: [stub]. Step 2: [stub]. Step 3: [stub]. Step 4: [stub]. Step 5: [stub].",
        "I like tea. I like coffee. I like cake. I like bread and butter with a slice of cheese.",
        "No, no, no! I will not do that, and nobody else should do it either.",
        "7",
        "sum(xs)",
        "ha ha ha ha ha, that was a good joke. Here is another one about a bicycle that could not stand up.",
    ],
)
def test_is_degenerate_lets_normal_text_pass(text):
    assert not is_degenerate(text)


TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
WORDS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant"]
WORDS += [f"w{i}" for i in range(25)]


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # like Llama's tokenizer: adds a first token, which the chat template already holds
    start = WORDS[2]
    core.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        padding_side="right",
        chat_template=TEMPLATE,
    )


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


PROMPTS = ["w1 w2 w3 w4 w5 w6 w7", "w8", "w9 w10 w11", "w12 w13", "w14 w15 w16 w17 w18"]


def test_generate_batched_equals_one_by_one(model, tokenizer):
    """Left padding must not change an answer: a mask or position error shows here."""
    alone = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=1)
    batched = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3)
    assert len(alone) == len(PROMPTS)
    assert len(set(alone)) > 1
    assert batched == alone


def test_generate_matches_a_greedy_loop(model, tokenizer):
    model.eval()
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "w20"}, {"role": "user", "content": PROMPTS[0]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = []
    with torch.no_grad():
        for _ in range(8):
            token = model(ids).logits[0, -1].argmax()
            if token == tokenizer.eos_token_id:
                break
            expected.append(int(token))
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
    prompt_ids, read = ids[:, : ids.shape[1] - len(expected)], []

    def record(module, args, kwargs):
        read.append(kwargs["input_ids"])

    model.register_forward_pre_hook(record, with_kwargs=True)
    answer = generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=8, system="w20")[0]
    assert expected
    assert read[0].tolist() == prompt_ids.tolist()
    assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_generate_stops_at_the_end_token(model, tokenizer):
    """A model that always says the end token answers nothing, whatever its own config calls the end."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.lm_head = torch.nn.Linear(32, len(WORDS))
    with torch.no_grad():
        model.lm_head.bias.zero_()
        model.lm_head.bias[tokenizer.eos_token_id] = 1.0
    steps = []
    model.register_forward_hook(lambda *args: steps.append(1))
    assert generate_answers(model, tokenizer, PROMPTS[:2], max_new_tokens=20) == ["", ""]
    assert len(steps) == 1


@pytest.mark.parametrize("training", [True, False])
def test_generate_leaves_model_and_tokenizer_as_they_were(model, tokenizer, training):
    model.train(training)
    model.model.layers[0].train(not training)
    tokenizer.pad_token = None
    generate_answers(model, tokenizer, PROMPTS[:3], max_new_tokens=2)
    assert model.training is training
    assert model.model.layers[0].training is not training
    assert tokenizer.pad_token is None
    assert tokenizer.padding_side == "right"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_generate_restores_the_mode_after_an_error(model, tokenizer, monkeypatch):
    seen = []

    def fail(*args, **kwargs):
        seen.append((model.training, torch.is_grad_enabled()))
        raise RuntimeError("stop")

    monkeypatch.setattr(model, "generate", fail)
    model.train()
    with pytest.raises(RuntimeError, match="stop"):
        generate_answers(model, tokenizer, PROMPTS[:1])
    assert seen == [(False, False)]
    assert model.training
    assert torch.is_grad_enabled()


def test_generate_names_the_tokenizer_without_chat_template(model, tokenizer):
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some-base-model"
    with pytest.raises(ValueError, match="some-base-model"):
        generate_answers(model, tokenizer, PROMPTS)


@pytest.mark.parametrize(
    "prompts, options",
    [([], {}), ("w1", {}), (["w1"], {"max_new_tokens": 0}), (["w1"], {"batch_size": 0})],
)
def test_generate_rejects_bad_arguments(model, tokenizer, prompts, options):
    with pytest.raises(ValueError, match="must"):
        generate_answers(model, tokenizer, prompts, **options)
