"""Memory of one training step before it runs: the real model code on fake tensors, without weights or arithmetic."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention import NAME
from .families import FAMILIES
from .live_memory import LiveMemory, gradients
from .patch import attention_modules
from .probe import Probe, Relay, unwrap

METHODS = ("plain", "surgery", "paper")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTOCAST = "bf16-autocast"
OPTIMIZERS = ("adamw", "none")
ENGINES = ("none", "ddp", "fsdp2", "zero2", "zero3")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")

# Public config.json numbers of each model; everything else at its class default.
SHAPES = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}

# sdpa without a mask: transformers cannot read the values of a fake mask and would materialise [B, 1, T, T]
_SDPA = "surgery_estimate_sdpa"


@dataclass(frozen=True)
class StepEstimate:
    """Bytes of one training step.

    Attributes:
        method: "plain", "surgery" or "paper".
        parameters: parameters and buffers.
        gradients: gradients that are there during the whole step; 0 when they are made within it, in which case
            they are part of `activations`.
        optimizer: optimizer state, and DeepSpeed's float32 weights where the model's are of lower precision.
        activations: the rest at the peak: saved activations, logits, attention maps, temporaries.
        engine: what the engine adds: DDP's gradient buckets, the parameters that FSDP2 and ZeRO-3 gather, 0 alone.
    """

    method: str
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    engine: int = 0

    @property
    def total(self):
        return self.parameters + self.gradients + self.optimizer + self.activations + self.engine


def shape_config(model):
    """A transformers config.

    Args:
        model: a key of SHAPES, a model folder or hub id, or a transformers config, returned as it is.
    Raises:
        ValueError: nothing of that name.
    """
    if not isinstance(model, str):
        if not hasattr(model, "model_type"):
            raise ValueError(f"model must be a name or a transformers config, got {type(model).__name__}")
        return model
    if model.lower() in SHAPES:
        return AutoConfig.for_model(**SHAPES[model.lower()])
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"no model {model!r}: known shapes are {', '.join(SHAPES)}; {error}") from error


def estimate_step(
    model,
    *,
    method="surgery",
    task_batch=1,
    task_length=512,
    probe_pairs=1,
    probe_length=512,
    dtype="bfloat16",
    checkpointing=False,
    lora=None,
    gradients_resident=None,
    optimizer="adamw",
    engine="none",
    ranks=1,
):
    """Peak memory of one micro-step of training.

    The step is run on fake tensors: model code, autograd and checkpointing are the real ones. "plain" is the task
    batch alone with sdpa; "surgery" is the regulariser's forward and backward, then the task batch; "paper" is eager
    attention for everything and one backward through the maps of both probe batches and the task loss, as
    released. The task loss is Hugging Face's cross entropy on all logits, in fp32.

    Not counted: what one operator allocates and frees inside itself (the `cpu` backend's temporaries are a few rows
    wide, the `reference` backend's are [B, H, T, T]), temporaries of optimizer.step(), the allocator's
    fragmentation, the CUDA context (about 0.5 GiB), the forward without gradient that searches the argmax sink
    (smaller than the probe's own): this is one device.

    With an engine it is one of `ranks` devices, each with its own task and probe batches. Measured is the step of the
    whole model; the engine's share of parameters, gradients and optimizer state is computed: "fsdp2" and "zero3" keep
    1 / ranks of all three, "zero2" of the last two, and gradients are there during the whole step. On top come DDP's
    buckets (a copy of the gradients), and what FSDP2 and ZeRO-3 gather at one time: all parameters outside the layers
    and two layers, one in use and one ahead. Reduction buffers of a fixed size (DeepSpeed's bucket options) are not
    counted.

    Args:
        model: a key of SHAPES, a model folder or hub id, or a transformers config. Weights are never loaded.
        method: one of METHODS.
        task_batch, task_length: sequences of a micro-batch, tokens of each.
        probe_pairs, probe_length: harmful and refusal sequences (each), tokens; ignored for "plain".
        dtype: "float32", "bfloat16", "float16", or "bf16-autocast" (fp32 weights under autocast).
        checkpointing: gradient checkpointing of every layer (non-reentrant).
        lora: rank of LoRA adapters on the attention projections, or None for full fine-tuning. Needs peft.
        gradients_resident: gradients exist before the micro-step, as from the second one on under accumulation;
            default: True with LoRA, else False.
        optimizer: "adamw" (two tensors a trainable parameter, in its dtype; float32 with ZeRO) or "none".
        engine: one of ENGINES.
        ranks: its processes.
    Returns:
        StepEstimate.
    Raises:
        ValueError: an unknown name or option, a size below 1, lengths beyond the model's positions.
        ImportError: lora without peft.
    """
    config = shape_config(model)
    _check_options(config, method, dtype, optimizer, lora)
    sizes = {"task_batch": task_batch, "task_length": task_length}
    if method != "plain":
        sizes.update(probe_pairs=probe_pairs, probe_length=probe_length)
    for name, value in sizes.items():
        low = 2 if name.endswith("length") else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{name} must be an int >= {low}, got {value!r}")
        longest = config.get_text_config().max_position_embeddings
        if name.endswith("length") and value > longest:
            raise ValueError(f"{name} must be at most {longest}, the positions of this model, got {value}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1 or (engine == "none" and ranks > 1):
        raise ValueError(f"ranks must be an int >= 1, and 1 without an engine, got {ranks!r} with engine {engine!r}")
    if gradients_resident is None:
        gradients_resident = lora is not None or engine != "none"
    if engine != "none" and not gradients_resident:
        raise ValueError(f"gradients_resident must be left out with engine {engine!r}: its gradients stay")
    verbosity = transformers_logging.get_verbosity()
    # fake tensors make transformers warn about things that are not so
    transformers_logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            model = _build(config, method, dtype, checkpointing, lora)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _to_fake(model)
            whole = _measure(
                model,
                method,
                (task_batch, task_length),
                (probe_pairs, probe_length),
                dtype == AUTOCAST,
                gradients_resident,
                optimizer,
            )
            return whole if engine == "none" else _share(whole, model, engine, ranks)
    finally:
        transformers_logging.set_verbosity(verbosity)


def add_lora(model, rank):
    """`model` with LoRA adapters of `rank` on the attention projections (LORA_TARGETS), the rest frozen.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "attention-surgery[train]"') from error
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, adapters)


def _check_options(config, method, dtype, optimizer, lora):
    known = {"method": (method, METHODS), "dtype": (dtype, (*DTYPES, AUTOCAST)), "optimizer": (optimizer, OPTIMIZERS)}
    for name, (value, choices) in known.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    family = config.get_text_config().model_type
    if method == "surgery" and family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(sorted(FAMILIES))}")
    if lora is not None and (isinstance(lora, bool) or not isinstance(lora, int) or lora < 1):
        raise ValueError(f"lora must be a rank >= 1 or None, got {lora!r}")


def _build(config, method, dtype, checkpointing, lora):
    AttentionInterface.register(_SDPA, sdpa_attention_forward)
    AttentionMaskInterface.register(_SDPA, lambda *args, **kwargs: None)
    attention = {"plain": _SDPA, "surgery": NAME, "paper": "eager"}[method]
    model = AutoModelForCausalLM.from_config(
        config, dtype=DTYPES.get(dtype, torch.float32), attn_implementation=attention
    ).train()
    # transformers 5.0 leaves meta weights untied
    model.tie_weights()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora is not None:
        model = add_lora(model, lora)
        if checkpointing:
            model.enable_input_require_grads()
    return model


def _to_fake(model):
    """Replace meta tensors by fake CPU tensors, in place. Building on fake tensors directly fails in peft."""
    replaced = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    new = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                    # `old` is kept alive so that its id stays its own
                    replaced[id(old)] = (new, old)
                tensors[name] = replaced[id(old)][0]


def _measure(model, method, task, probe, autocast, gradients_resident, optimizer):
    trainable = [p for p in model.parameters() if p.requires_grad]
    if gradients_resident:
        for p in trainable:
            p.grad = torch.empty_like(p)
    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with LiveMemory(model.parameters(), model.buffers(), gradients(trainable)) as memory:
        if method == "paper":
            with cast:
                penalty = _paper_penalty(model, *probe)
                loss = penalty + _task_loss(model, *task)
            loss.backward()
        else:
            if method == "surgery":
                with cast:
                    penalty = _surgery_penalty(model, *probe)
                penalty.backward()
                del penalty
            with cast:
                loss = _task_loss(model, *task)
            loss.backward()
    held = sum(p.nbytes for p in trainable) if gradients_resident else 0
    return StepEstimate(
        method,
        memory.resident - held,
        held,
        2 * sum(p.nbytes for p in trainable) if optimizer == "adamw" else 0,
        memory.peak - memory.resident,
    )


def _share(whole, model, engine, ranks):
    """What one of `ranks` processes holds of a StepEstimate of the whole model."""
    sharded = engine in ("fsdp2", "zero3")
    optimizer = whole.optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    if engine.startswith("zero") and optimizer:
        # Adam in float32, and a float32 copy of weights that are not
        optimizer = sum((8 + 4 * (p.dtype != torch.float32)) * p.numel() for p in trainable)
    buffers = sum(b.nbytes for b in model.buffers())
    parameters = whole.parameters
    if sharded:
        parameters = (parameters - buffers) // ranks + buffers
    extra = 0
    if engine == "ddp" and ranks > 1:
        extra = whole.gradients
    elif sharded and ranks > 1:
        layers = sorted(sum(p.nbytes for p in layer.parameters()) for layer in unwrap(model).model.layers)
        extra = whole.parameters - buffers - sum(layers) + sum(layers[-2:])
    divided = 1 if engine == "ddp" else ranks
    return StepEstimate(
        whole.method, parameters, whole.gradients // divided, optimizer // divided, whole.activations, extra
    )


def _tokens(batch, length):
    """input_ids [B, T] and an attention_mask [B, T]; without it transformers takes fake rows for packed ones."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    return {"input_ids": ids, "attention_mask": torch.ones(batch, length, dtype=torch.bool), "use_cache": False}


def _task_loss(model, batch, length):
    tokens = _tokens(batch, length)
    return model(**tokens, labels=tokens["input_ids"]).loss


def _surgery_penalty(model, pairs, length):
    """What SurgeryRegularizer does, without its checks, which read values."""
    base = unwrap(model)
    heads = base.config.get_text_config().num_attention_heads
    recorded = torch.zeros(len(attention_modules(base)), 2 * pairs, heads)
    bounds = torch.zeros(2 * pairs, 2, dtype=torch.int32)
    probe = Probe("penalty", recorded, bounds, torch.zeros(2 * pairs, length), None, 1, pairs, torch.zeros(2 * pairs))
    logits = model(**_tokens(2 * pairs, length), logits_to_keep=1, surgery_ctx=probe).logits
    return Relay.apply(logits, recorded.sum(), 1.0, probe, lambda: None)


def _paper_penalty(model, pairs, length):
    tokens = _tokens(pairs, length)
    # with all logits, as released
    maps = [model(**tokens, output_attentions=True).attentions for _ in ("harmful", "refusal")]
    means = [torch.stack([attn[:, :, 1:, 0].float().mean((0, 2)) for attn in side]) for side in maps]
    return torch.relu(means[0] - means[1]).mean()
