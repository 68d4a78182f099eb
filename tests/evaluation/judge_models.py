"""Tiny random models of the judges' architectures, saved as folders, with a tokenizer that keeps every byte."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
WORDS = ("Yes", "No", "safe", "unsafe")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def byte_tokenizer(chat_template=None):
    """Bytes and a few whole words; adds <s> in front of plain text, as Llama's, Mistral's and Gemma's do."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def config_of(family, tokenizer, **more):
    return AutoConfig.for_model(family, **{**TINY, "vocab_size": len(tokenizer), **more})


def save_generator(folder, family, chat_template=None, seed=0):
    """A random causal model of `family` in `folder`. Returns (model, tokenizer)."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(chat_template)
    model = AutoModelForCausalLM.from_config(config_of(family, tokenizer)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def save_classifier(folder, labels):
    """A random Llama classifier with the named labels."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    names = dict(enumerate(labels))
    options = {"num_labels": len(labels), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    config = config_of("llama", tokenizer, problem_type="multi_label_classification", **options)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def always_says(model, token_id):
    """Make a causal model answer one token whatever it reads; the vocabulary's other tokens get no weight."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        if hasattr(model.model.norm, "eps") and type(model.model.norm).__name__.startswith("Gemma"):
            model.model.norm.weight.fill_(-1.0)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    head.bias.data[token_id] = 1.0
    model.lm_head = head
