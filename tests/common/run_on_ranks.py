"""What the ranks of a `group` run for test_run.py."""

import os

import torch
import torch.distributed as dist
from checkpoint_on_ranks import ended
from ranks_on_ranks import here

from common.config import Config, parse
from common.run import Run


def start(folder, name="run", steps=5):
    named = ["--run_name", name] if name else []
    config = parse(Config, ["--train.steps", str(steps), "--runs_dir", folder, *named])
    run = Run(config, here(), "test", units_per_step=10, fingerprint="fingerprint")
    model = torch.nn.Linear(1, 1)
    run.restore(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return run


def log(run, step, value=None):
    loss_sum = torch.tensor(float((run.ranks.rank + 1) * (step + 1)) if value is None else value)
    run.log(step, loss_sum, torch.tensor(1.0), 0.1)


def log_five_steps(folder, flops_per_unit=None, peak_flops=None):
    run = start(folder)
    run.flops_per_unit, run.peak_flops = flops_per_unit, peak_flops
    for step in run.steps():
        log(run, step)
    run.finish()


def count_collectives(folder):
    run, calls, rows_seen, kept = start(folder), [], [], dist.all_reduce
    count = [0]

    def counted(*args, **kwargs):
        count[0] += 1
        return kept(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for step in run.steps():
            count[0] = 0
            log(run, step)
            calls.append(count[0])
            rows_seen.append(len(run.rows))
    finally:
        dist.all_reduce = kept
    run.finish()
    return calls, rows_seen


def steps_until_stopped(folder, who, at):
    run = start(folder, steps=50)
    done = 0
    for step in run.steps():
        if step == at and run.ranks.rank == who:
            run._stop_requested.set()
        log(run, step)
        done += 1
    run.finish()
    return done


def folder_name(folder, environment):
    os.environ.update(environment)
    try:
        run = start(folder, name=None)
        run.finish()
        return run.folder.name
    finally:
        for name in environment:
            del os.environ[name]


def log_nan(folder):
    run = start(folder)

    def loop():
        for step in run.steps():
            log(run, step, float("nan") if step == 2 and run.ranks.rank == 1 else None)

    return ended(loop)


def begin_or_go_on(folder, arguments, environment=None, fingerprint="fingerprint"):
    """Train, saving as the settings say: (the first step done, the folder's name), or exit code and message."""
    kept, answer = dict(os.environ), []
    os.environ.update(environment or {})

    def train():
        config = parse(Config, ["--runs_dir", folder, *arguments])
        run = Run(config, here(), "test", units_per_step=10, fingerprint=fingerprint)
        torch.manual_seed(0)  # the same on all ranks
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.restore(model, optimizer)
        for step in run.steps():
            log(run, step)
            run.save_if_due(step, model, optimizer)
        run.finish()
        answer.extend([run.first_step, run.folder.name])

    try:
        failed = ended(train)
        return answer or failed
    finally:
        os.environ.clear()
        os.environ.update(kept)
