"""The model families that pass the parity test (tests/models), by Hugging Face's `model_type`. Data only.

A new family is a row: a tiny configuration for the tests, and what is special about it. Families that keep their
own attention code (falcon, bloom, gptj, ...) or a learned sink logit (gpt_oss) cannot be patched.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        tiny: configuration overrides of the tiny test model, on top of TINY.
        softcap: attention applies a softcap; sdpa leaves it out, so parity is against eager.
    """

    tiny: dict = field(default_factory=dict)
    softcap: bool = False


TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}

FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 8}),
    "qwen2": Family({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": Family(),
    "qwen3_moe": Family({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "mixtral": Family({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma": Family(),
    "gemma2": Family({"sliding_window": 6, "query_pre_attn_scalar": 16}, softcap=True),
    "gemma3_text": Family({"sliding_window": 6, "query_pre_attn_scalar": 16}),
    "phi3": Family({"sliding_window": None}),
    "olmo2": Family(),
    "smollm3": Family(),
    "granite": Family({"attention_multiplier": 0.3}),
    "starcoder2": Family({"sliding_window": None}),
    "cohere2": Family({"sliding_window": 6}),
    "glm4": Family({"partial_rotary_factor": 0.5}),
}
