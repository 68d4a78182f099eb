"""A tiny TRL run of any trainer, with and without the regulariser, and what the optimizer saw in its first step."""

import torch
from tiny import rows, tiny_model, tiny_tokenizer, worst_error
from transformers import TrainerCallback

import surgery
from surgery.data import ProbeData

HARMFUL, REFUSAL = rows(9, seed=10, response_words=8), rows(7, seed=11, response_words=4)
CONFIG = surgery.SurgeryConfig(pairs_per_step=2)
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


class FirstGradient(TrainerCallback):
    """Gradients by name as the first optimizer step sees them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(make_trainer, with_surgery, make_model):
    """(trainer, gradients of its first step) of make_trainer(model); the run is seeded."""
    torch.manual_seed(0)
    trainer = make_trainer(make_model())
    keep = FirstGradient()
    trainer.add_callback(keep)
    if with_surgery:
        trainer.add_callback(surgery.SurgeryCallback(CONFIG, HARMFUL, REFUSAL, tiny_tokenizer()).attach(trainer))
    trainer.train()
    return trainer, keep.found


def penalty_gradient(model):
    """Gradients by name of the penalty alone on the probe batches of step 0."""
    penalty = surgery.SurgeryRegularizer(surgery.patch_model(model), CONFIG)(
        *ProbeData(HARMFUL, REFUSAL, tiny_tokenizer(), CONFIG).batches(0)
    )
    assert penalty > 0
    penalty.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(make_trainer, make_model=lambda: tiny_model(attention="sdpa")):
    """The first step's gradient is the plain run's plus the penalty's, once. Returns both trainers, plain first."""
    (plain, without), (ours, found) = (run(make_trainer, extra, make_model) for extra in (False, True))
    assert any(gradient.abs().max() > 0 for gradient in without.values())
    assert any("surgery/penalty" in line for line in ours.state.log_history)
    difference = {name: found[name] - without.get(name, 0.0) for name in found}
    assert worst_error(difference, penalty_gradient(make_model())) <= 1e-4
    assert ours.model.config._attn_implementation == "sdpa"
    return plain, ours
