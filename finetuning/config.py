"""The settings that all scripts for fine-tuning have."""

from dataclasses import dataclass, field

from common.config import RunConfig, TrainConfig
from common.config_fields import PathText
from finetuning.squad import QuestionsConfig


@dataclass
class FinetuneTrain(TrainConfig):
    """How long to train, in which arithmetic, and what to look at on the way."""

    steps: int = 300
    """Optimizer steps of the whole training, whatever the world size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            raise ValueError(
                "train.compile = true is not for this script: each prompt has another length; leave it out"
            )


@dataclass
class FinetuneConfig(RunConfig):
    """The settings of a script that fine-tunes a language model."""

    train: FinetuneTrain = field(default_factory=FinetuneTrain)
    data: QuestionsConfig = field(default_factory=QuestionsConfig)
    model_path: PathText | None = None
    """A local folder in the Hugging Face format, with safetensors; by default a tiny Llama with random weights."""
    export: bool = True
    """Write what was trained to exported/ in the run folder when all steps are done."""
