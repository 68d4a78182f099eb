"""The regulariser in training frameworks that build their Trainer themselves. Each module imports its framework."""

from ..config import SurgeryConfig


def read_options(options):
    """(SurgeryConfig, harmful, refusal) out of one mapping of a framework's configuration file.

    Args:
        options: `harmful` and `refusal`, see `data.read_rows`; the rest are options of SurgeryConfig.
    Raises:
        ValueError: no mapping, a side is missing, an unknown option or a value outside its range.
    """
    if not isinstance(options, dict):
        raise ValueError(f"surgery must be a mapping with harmful and refusal, got {type(options).__name__}")
    rest = dict(options)
    missing = [side for side in ("harmful", "refusal") if not rest.get(side)]
    if missing:
        raise ValueError(
            f"surgery needs probe data: {' and '.join(missing)} missing (JSON lines files or data set ids)"
        )
    harmful, refusal = rest.pop("harmful"), rest.pop("refusal")
    return SurgeryConfig.from_preset(rest.pop("preset", "paper"), **rest), harmful, refusal
