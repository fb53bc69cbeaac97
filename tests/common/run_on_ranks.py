"""What the ranks of a `group` run for test_run.py."""

import contextlib
import io
import os
import resource
import signal

import torch
import torch.distributed as dist
from ranks_on_ranks import ended, environment, here

import common.run
from common import checkpoint
from common.config import Config, parse
from common.optimizer import build_optimizer
from common.run import Run


def start(folder, *more, name="run", steps=5):
    named = ["--run_name", name] if name else []
    config = parse(Config, ["--train.steps", str(steps), "--runs_dir", folder, *named, *more])
    run = Run(config, here(), "test", units_per_step=10, fingerprint="fingerprint")
    model = torch.nn.Linear(1, 1)
    run.restore(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return run


def log(run, step, value=None, norm=1.0):
    loss_sum = torch.tensor(float((run.ranks.rank + 1) * (step + 1)) if value is None else value)
    run.log(step, loss_sum, torch.tensor(norm), 0.1)


def log_five_steps(folder, flops_per_unit=None, peak_flops=None, more=()):
    run = start(folder, *more)
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
            rows_seen.append(len(run._metrics.rows) if run.ranks.is_main else 0)
    finally:
        dist.all_reduce = kept
    run.finish()
    return calls, rows_seen


def steps_until_stopped(folder, who, at):
    run = start(folder, steps=50)
    done = 0
    for step in run.steps():
        if step == at and run.ranks.rank == who:
            run.stop_request.request()
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


def begin_or_go_on(folder, arguments, environment=None, fingerprint="fingerprint", optimizer="SGD", norms=None):
    """Train, saving as the settings say: (the first step done, the folder's name), or exit code and message.

    Gradient norms are 1, but for those of the steps in `norms`.
    """
    kept, answer = dict(os.environ), []
    os.environ.update(environment or {})

    def train():
        config = parse(Config, ["--runs_dir", folder, *arguments])
        run = Run(config, here(), "test", units_per_step=10, fingerprint=fingerprint)
        torch.manual_seed(0)  # the same on all ranks
        model = torch.nn.Linear(1, 1)
        built = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
        run.restore(model, built)
        for step in run.steps():
            log(run, step, norm=(norms or {}).get(step, 1.0))
            run.end_step(step, model, built)
        run.finish()
        answer.extend([run.first_step, run.folder.name])

    try:
        failed = ended(train)
        return answer or failed
    finally:
        os.environ.clear()
        os.environ.update(kept)


def steps_until_told(folder, how, who):
    """Rank `who` gets a signal of this name in step 2, or a file named `stop` appears: how many steps are done."""
    number = getattr(signal, how, signal.SIGTERM)
    before = signal.getsignal(number)  # of a run before this one, where that ended early
    run = start(folder, steps=50)
    if how == "stop" and run.ranks.is_main:
        (run.folder / "stop").touch()
    done = 0
    for step in run.steps():
        if how != "stop" and step == 2 and run.ranks.rank == who:
            os.kill(os.getpid(), number)
        log(run, step)
        done += 1
    run.finish()
    return done, signal.getsignal(number) == before


def what_is_drawn(folder, steps):
    """A random number in each step, as dropout would draw it; the loop's own draws in between move no other."""
    config = parse(Config, ["--runs_dir", folder, "--run_name", "run", "--train.steps", str(steps)])
    run, drawn = Run(config, here(), "test", units_per_step=10), {}
    torch.manual_seed(0)  # the same weights on all ranks
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.restore(model, optimizer)
    for step in run.steps():
        drawn[step] = float(torch.rand(()))
        torch.rand(step + 1 + run.ranks.rank)
        log(run, step)
        run.end_step(step, model, optimizer)
    run.finish()
    return drawn


def state_after(folder, steps, name, resume="auto"):
    """Train with AdamW and a scaler to `steps` of 4 steps: everything that the next step depends on."""
    config = parse(Config, ["--runs_dir", folder, "--run_name", name, "--train.steps", "4", "--resume", resume])
    run = Run(config, here(), "test", units_per_step=10)
    torch.manual_seed(5)
    model, scaler = torch.nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if resume != "auto":
        with torch.no_grad():
            model.weight.zero_()  # what is not loaded is not there
    run.restore(model, optimizer, scaler)
    for step in run.steps():
        run._stopping = step + 1 == steps
        scaler.scale(model(torch.full((1, 2), step + 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log(run, step)
        run._stopping = step + 1 == steps
        run.end_step(step, model, optimizer, scaler)
    run.finish()
    state = {f"{name}.{key}": value.tolist() for name, p in model.named_parameters()
             for key, value in {"weight": p.detach(), **optimizer.state[p]}.items()}  # fmt: skip
    return run.first_step, run.steps_done, scaler.state_dict(), state


def when_replicas_are_checked(folder, every):
    """The steps after which the replicas are compared, of 5 steps."""
    kept, checked = common.run.check_replicas, []
    common.run.check_replicas = lambda model, step, group: checked.append(step + 1)
    try:
        arguments = ["--runs_dir", folder, "--train.steps", "5", "--train.check_replicas_every", str(every)]
        run = Run(parse(Config, arguments), here(), "test", units_per_step=10)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.restore(model, optimizer)
        for step in run.steps():
            log(run, step)
            run.end_step(step, model, optimizer)
        run.finish()
    finally:
        common.run.check_replicas = kept
    return checked


def steps_with_stop_file(folder, path):
    with environment({"STOP_FILE": path}):
        return steps_until_stopped(folder, None, None)


def evaluate_to(folder, value):
    """Three steps and their evaluation, whose result is `value`: how it ends."""
    run = start(folder, steps=3)

    def loop():
        for step in run.steps(lambda: value):
            log(run, step)
        run.finish()

    return ended(loop)


def no_room_from(folder, step_without_room):
    """From this step on no file may grow: how the run ends, and after how many steps of 50."""
    run, done, unlimited = start(folder, steps=50), [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def loop():
        for step in run.steps():
            if step == step_without_room and run.ranks.is_main:
                most = (run.folder / "metrics.jsonl").stat().st_size + 10  # a torn line has room
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
            log(run, step)
            done.append(step)
        run.finish()

    try:
        return ended(loop), len(done)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def settings_after_resume(folder, arguments):
    """What the optimizer goes on with, and what is printed."""
    config = parse(Config, ["--runs_dir", folder, *arguments])
    torch.manual_seed(0)
    model, printed = torch.nn.Linear(2, 2), io.StringIO()
    optimizer = build_optimizer(model.parameters(), config.optimizer, torch.device("cpu"))
    with contextlib.redirect_stdout(printed):
        run = Run(config, here(), "test", units_per_step=10)
        run.restore(model, optimizer)
        for step in run.steps():
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            log(run, step)
            run.end_step(step, model, optimizer)
        run.finish()
    return [group["betas"] + (group["weight_decay"],) for group in optimizer.param_groups], printed.getvalue()


def printed_of(folder, arguments, fingerprint="fingerprint"):
    """Of `begin_or_go_on`: its answer, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        answer = begin_or_go_on(folder, arguments, fingerprint=fingerprint)
    return answer, printed.getvalue()


def tf32(folder: str, more: list[str]) -> tuple[str, bool]:
    """Whether matmuls and convolutions may run as TF32 once a run has begun."""
    start(folder, *more)
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def committed_meanwhile(folder):
    """An attempt before this one commits step 4 when this one has looked, and not loaded: (first step, weight)."""
    config = parse(Config, ["--train.steps", "6", "--runs_dir", folder, "--run_name", "run"])
    run = Run(config, here(), "test", units_per_step=10, fingerprint="fingerprint")
    model = torch.nn.Linear(1, 1)
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=0.1), []
    load = checkpoint.load

    def load_slowly(start, *rest):
        content = load(start, *rest)
        if not weights:
            weights.append(float(model.weight))
            with torch.no_grad():
                model.weight.fill_(7.0)
            checkpoint.save(run.folder / "checkpoints", 4, model, optimizer, here())
        return content

    checkpoint.load = load_slowly
    try:
        run.restore(model, optimizer)
    finally:
        checkpoint.load = load
    steps = [step for step in run.steps() if log(run, step) is None]
    run.finish()
    return steps, float(model.weight)
