"""axolotl: a plugin that adds SurgeryCallback to the trainer axolotl builds (SFT and preference training).

plugins:
  - surgery.integrations.axolotl.SurgeryPlugin
surgery:
  harmful: harmful.jsonl
  refusal: refusals.jsonl
  lambda_sink: 300.0          # and any other option of SurgeryConfig
"""

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator

from ..callback import SurgeryCallback
from . import read_options


class SurgeryArgs(BaseModel):
    """The key that the plugin adds to axolotl's configuration."""

    surgery: dict | None = None

    @field_validator("surgery")
    @classmethod
    def check(cls, options):
        # a wrong option stops the run before anything is loaded
        if options is not None:
            read_options(options)
        return options


class SurgeryPlugin(BasePlugin):
    """See the module's docstring."""

    def get_input_args(self):
        return f"{__name__}.{SurgeryArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg, trainer):
        """The callback, attached to `trainer`.

        Raises:
            ValueError: no `surgery:` in the configuration; packed rows whose attention_mask numbers the documents,
                which only axolotl's flash attention reads; sequences split over ranks.
        """
        if cfg.get("surgery") is None:
            raise ValueError("the plugin is loaded, but the configuration has no `surgery:` with harmful and refusal")
        args = trainer.args
        packs = getattr(args, "sample_packing", False) or cfg.get("sample_packing")
        if packs and (cfg.get("pretraining_dataset") or not getattr(args, "sample_packing_drop_attention_mask", False)):
            raise ValueError(
                "sample_packing keeps an attention_mask that numbers the documents, and Surgery's attention would let "
                "them see one another: set attn_implementation: sdpa and a map-style dataset, or sample_packing: false"
            )
        if (cfg.get("context_parallel_size") or 1) > 1:
            raise ValueError(
                f"context_parallel_size must be 1, got {cfg.get('context_parallel_size')}: axolotl's ring attention "
                f"replaces the attention that Surgery needs"
            )
        config, harmful, refusal = read_options(dict(cfg.get("surgery")))
        return [SurgeryCallback(config, harmful, refusal).attach(trainer)]
