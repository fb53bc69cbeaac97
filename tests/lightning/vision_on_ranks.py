"""What the ranks of a `group` run for the tests of lightning/train_vision.py."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist
from own_folder import own_folder
from rank_worker import starts_its_own_group
from variables import variables

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "lightning" / "train_vision.py"


def load_script():
    """lightning/train_vision.py as a module, with the modules of its own folder."""
    spec = importlib.util.spec_from_file_location("lightning_train_vision", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@starts_its_own_group
def counted(arguments: list[str]) -> dict[str, int]:
    """Train on this rank, and count: calls of the optimizer, gradients sent, and images seen in training.

    DDP sends a bucket through its communication hook; ours does what DDP would, and counts.
    """
    counts = Counter()

    def send(state, bucket):
        counts["sent"] += bucket.is_last()  # the last bucket of a backward
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    with own_folder(SCRIPT), variables({}):
        vision = load_script()

        class Counting(vision.VisionRun):
            def on_fit_start(self, trainer, module):
                trainer.strategy.model.register_comm_hook(None, send)
                super().on_fit_start(trainer, module)

            def on_before_optimizer_step(self, trainer, module, optimizer):
                counts["steps"] += 1
                super().on_before_optimizer_step(trainer, module, optimizer)

            def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
                counts["images"] += len(batch[0])
                super().on_train_batch_end(trainer, module, outputs, batch, batch_index)

        vision.VisionRun = Counting
        vision.main(vision.parse(vision.LightningVisionConfig, arguments))
    return dict(counts)
