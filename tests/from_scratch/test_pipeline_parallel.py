"""Pipeline parallelism by hand: equal to one process, and in exactly the order that the schedule is named for."""

import itertools
import sys

import pytest
import torch
from equality import STEPS
from launching import ROOT, OnRanks

sys.path.insert(0, str(ROOT / "from_scratch"))

import gantt
import pipeline_parallel as pp

from common.transformer import ModelConfig

ON_RANKS = OnRanks("tests/from_scratch/pp_on_ranks.py")
EIGHT = {"layers": 8}


def check(answers):
    """fp64, sums in another order: some 1e-16 of values of order 1; a forgotten or doubled gradient shows as 1e-3."""
    for rank, (seen, _) in enumerate(answers):
        assert seen.pop("moved") > 1e-2 / 10  # after three steps 3e-3 x 3 at most
        assert seen.pop("layers") > 0
        assert seen.keys() - {"loss"} == {"gradients", "norm", "parameters"}
        assert ("loss" in seen) == (rank == len(answers) - 1)
        assert max(seen.values()) <= 1e-12, seen
    return [events for _, events in answers]


def sequence(events, *kinds):
    """`F0.1` is the forward of micro-batch 1 on stage 0; B backward, S send, R receive."""
    return [f"{event['event'][0].upper()}{event['stage']}.{event['micro_batch']}"
            for event in events if not kinds or event["event"] in kinds]  # fmt: skip


def check_order(logs, schedule, micro_batches, chunks=1):
    """What was recorded on each rank is what the schedule prescribes, in flight included, and gantt.py names it."""
    for rank, events in enumerate(logs):
        planned = pp.order(schedule, rank, len(logs), micro_batches, chunks)
        wanted = [f"{kind[0].upper()}{chunk * len(logs) + rank}.{number}" for kind, chunk, number in planned]
        assert sequence(events, "forward", "backward") == wanted
        assert all(event["start"] <= event["end"] for event in events)
        assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(events))
    together = [event for events in logs for event in events]
    return gantt.name_schedule(together), [gantt.peak_in_flight(row) for row in gantt.computed(together).values()]


QUICK = [(2, "1f1b", 1), (2, "1f1b", 8), (3, "1f1b", 4), (3, "afab", 8), (4, "1f1b", 8), (2, "afab", 4)]
PLAIN = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
         for case in itertools.product([2, 3, 4], ["afab", "1f1b"], [1, 4, 8])]  # fmt: skip


@pytest.mark.parametrize(("ranks", "schedule", "micro_batches"), PLAIN)
def test_training_is_that_of_one_process(group, ranks, schedule, micro_batches):
    steps = STEPS if micro_batches == 4 else 3
    logs = check(group(ranks)(ON_RANKS.train, schedule, micro_batches, 1, {"layers": 4}, steps))
    name, peaks = check_order(logs, schedule, micro_batches)
    if schedule == "afab":
        assert peaks == [micro_batches] * ranks
    else:
        assert peaks == [min(micro_batches, ranks - stage) for stage in range(ranks)]
    if micro_batches == 1:
        assert name == "AFAB or 1F1B (with one micro-batch they are the same)"
    else:
        assert name == schedule.upper()


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks", "changes", "steps"), [
    (2, 4, 2, {"layers": 4, "tied": True}, STEPS),
    (2, 8, 4, EIGHT, 3),
    pytest.param(3, 3, 2, EIGHT, 3, marks=pytest.mark.slow),
    (3, 6, 2, {"layers": 6}, 3),
    pytest.param(4, 4, 2, EIGHT, 3, marks=pytest.mark.slow),
    pytest.param(4, 8, 2, EIGHT, 3, marks=pytest.mark.slow),
])  # fmt: skip
def test_interleaved(group, ranks, micro_batches, chunks, changes, steps):
    logs = check(group(ranks)(ON_RANKS.train, "interleaved", micro_batches, chunks, changes, steps))
    name, peaks = check_order(logs, "interleaved", micro_batches, chunks)
    assert name == f"interleaved 1F1B with {chunks} stages a rank"
    assert peaks == [min(chunks * micro_batches, 2 * (ranks - r - 1) + (chunks - 1) * ranks + 1) for r in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_tied_embedding_and_uneven_layers(group, ranks):
    """The tied weight lives on the first and the last stage, with one gradient; layers go where the caller says."""
    ends = {2: [0, 1, 4], 4: [0, 1, 3, 4, 5]}[ranks]
    layers = [range(a, b) for a, b in itertools.pairwise(ends)]
    answers = group(ranks)(ON_RANKS.train, "1f1b", 4, 1, {"layers": ends[-1], "tied": True}, STEPS, layers)
    assert [seen["layers"] for seen, _ in answers] == [len(part) for part in layers]
    check(answers)


def test_orders_written_by_hand():
    def row(*arguments):
        return " ".join(f"{kind[0].upper()}{c}.{m}" for kind, c, m in pp.order(*arguments))  # chunks, not stages

    assert row("afab", 1, 3, 3) == "F0.0 F0.1 F0.2 B0.0 B0.1 B0.2"
    assert [row("1f1b", rank, 3, 4) for rank in range(3)] == [
        "F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3",
        "F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3",
        "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3",
    ]
    assert [row("interleaved", rank, 2, 4, 2) for rank in range(2)] == [
        "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3",
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3",
    ]


def test_messages_in_their_places(group):
    first, second = (
        "".join(event["event"][0] for event in events)
        for _, events in group(2)(ON_RANKS.train, "1f1b", 4, 1, {"layers": 4}, 3)
    )
    assert first == "fs" + "fsrb" * 3 + "rb"
    assert second == "rfbs" * 4


def test_every_schedule_runs_to_its_end_with_the_ideal_bubble():
    """On ideal ranks, whose stages take equal time; (p - 1) / (v·m + p - 1) exactly, up to rounding."""
    for ranks in (1, 2, 3, 4, 8):
        for micro_batches in (1, 4, 8, 12, 24):
            for schedule, chunks in (("afab", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)):
                if schedule == "interleaved" and (micro_batches % ranks or ranks == 1):
                    continue
                events = gantt.simulate(schedule, ranks, micro_batches, chunks)
                assert len(events) == 2 * ranks * micro_batches * chunks
                wanted = gantt.ideal_bubble(ranks, micro_batches, chunks)
                assert gantt.bubble(events) == pytest.approx(wanted, abs=1e-12)


def test_a_chart_is_named_for_what_it_shows(group, monkeypatch, capsys, tmp_path):
    """Recorded from 1F1B, in a folder that says afab; its second step is shown."""
    group(3)(ON_RANKS.write_log, "1f1b", str(tmp_path / "afab"))
    monkeypatch.setattr(sys, "argv", ["gantt.py", str(tmp_path / "afab"), "--out", str(tmp_path / "chart.png")])
    gantt.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1F1B: 3 ranks, 4 micro-batches", "in flight at most, by rank: 3, 2, 1"]
    assert lines[2].startswith("bubble ") and lines[2].endswith("(ideal 33.3%)")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    events = gantt.read(tmp_path / "afab")
    assert {event["step"] for event in events} == {1}
    assert {event["event"] for event in events} == {"forward", "backward", "send", "recv"}


def test_other_orders_get_no_name():
    def log(*rows):
        return [
            {"step": 0, "rank": rank, "stage": rank, "micro_batch": int(number), "start": t, "end": t + 1,
             "event": {"F": "forward", "B": "backward"}[kind]}
            for rank, row in enumerate(rows) for t, (kind, number) in enumerate(row.split())
        ]  # fmt: skip

    assert gantt.name_schedule(log("F0 F1 B0 B1", "F0 F1 B0 B1")) == "AFAB"
    assert gantt.name_schedule(log("F0 F1 B0 B1", "F0 B0 F1 B1")) == "1F1B"
    one_by_one = log("F0 B0 F1 B1 F2 B2", "F0 B0 F1 B1 F2 B2")
    assert gantt.name_schedule(one_by_one) == "none of AFAB, 1F1B"
    in_pairs = log("F0 F1 B0 B1 F2 B2", "F0 B0 F1 B1 F2 B2")  # begins as 1F1B does
    assert gantt.name_schedule(in_pairs) == "none of AFAB, 1F1B"


@pytest.mark.parametrize(("options", "message"), [
    (["empty"], "error: no event in empty/*.jsonl; expected a folder"),
    (["--simulate", "interleaved", "--chunks", "2", "--micro_batches", "5"], "5 micro-batches on 4 ranks"),
    (["--simulate", "1f1b", "--ranks", "0"], "at least 1 rank and chunk"),
    ([], "expected a log's folder or --simulate"),
])  # fmt: skip
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gantt.py", *options])
    with pytest.raises(SystemExit) as ended:
        gantt.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error.splitlines()[-1]


def test_layers_are_split_by_cost():
    llama = ModelConfig(preset="llama3_8b")  # its head costs as much as 2.4 layers
    assert [len(part) for part in pp.split_by_cost(llama, 4)] == [
        8,
        9,
        9,
        6,
    ]  # the embedding is hardly anything, but not nothing
    parts = pp.split_by_cost(llama, 4)
    assert [number for part in parts for number in part] == list(range(32))
    assert [len(part) for part in pp.split_by_cost(ModelConfig(vocabulary=4), 3)] == [1, 2, 1]
    assert [len(part) for part in pp.split_by_cost(ModelConfig(), 4)] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"model.layers is 4 for 5 stages; expected a layer for each"):
        pp.split_by_cost(ModelConfig(), 5)


@pytest.mark.parametrize(("schedule", "chunks", "changes", "found"), [
    ("gpipe", 1, {}, "schedule is 'gpipe'; expected one of afab, 1f1b, interleaved"),
    ("1f1b", 2, {"layers": 4}, "1f1b with 2 stages a rank"),
    ("interleaved", 1, {}, "interleaved with 1 stages a rank"),
    ("1f1b", 1, {"layers": 1}, "model.layers is 1 for 2 stages"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(group, schedule, chunks, changes, found):
    for message in group(2)(ON_RANKS.refused, schedule, chunks, changes):
        assert message.startswith(found) and "\n" not in message


# ----------------------------------------------------------------------------------------- queues as NCCL keeps them


class LineOfRanks:
    """What a pipeline asks of its group, without ranks."""

    def __init__(self, rank, ranks):
        self.place = rank, ranks

    def rank(self):
        return self.place[0]

    def size(self):
        return self.place[1]


class Edges(dict):
    """Each edge is its own name."""

    def __missing__(self, edge):
        return edge


class Messages(list):
    """What one rank sends and receives, in order: (operation, direction, sender)."""

    def isend(self, tensor, peer, group):
        self.append(("send", *group))
        return self

    def recv(self, tensor, peer, group):
        self.append(("recv", *group))

    def wait(self):
        """A message that has left."""


def messages(monkeypatch, schedule, ranks, micro_batches, chunks):
    """The messages of a step of a real pipeline, for each rank."""
    config = ModelConfig(vocabulary=3, width=4, layers=ranks * chunks, heads=1, kv_heads=1, ffn_width=4)
    batch = [(torch.zeros(1, 2, dtype=torch.int64),) * 2] * micro_batches
    every = [Messages() for _ in range(ranks)]
    monkeypatch.setattr(pp.dist, "get_global_rank", lambda group, peer: peer)
    for rank, recorded in enumerate(every):
        monkeypatch.setattr(pp.dist, "isend", recorded.isend)
        monkeypatch.setattr(pp.dist, "recv", recorded.recv)
        pp.Pipeline(config, 1, 2, LineOfRanks(rank, ranks), Edges(), schedule, chunks).step(batch, 1.0)
    return every


def deadlocks(programs, queue_of):
    """Whether ranks block each other, if a send ends only when its receiver is there.

    An operation goes to the end of the queue of its group on its rank, and begins when those before it have ended. A
    rank goes on after it has posted a send, and waits in a receive.
    """
    queues, next_one, waits = {}, [0] * len(programs), [None] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while waits[rank] is None and next_one[rank] < len(program):
                message = program[next_one[rank]]
                queues.setdefault((rank, queue_of(message)), []).append(message)
                waits[rank] = message if message[0] == "recv" else None
                next_one[rank] += 1
                moved = True
        for (rank, key), queue in queues.items():
            if not queue or queue[0][0] != "recv":
                continue
            _, direction, sender = queue[0]
            other = queues.get((sender, key), [])
            if other and other[0] == ("send", direction, sender):
                queue.pop(0), other.pop(0)
                waits[rank] = None
                moved = True
    return any(queues.values()) or any(n < len(program) for n, program in zip(next_one, programs, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("schedule", "chunks"), [("afab", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
def test_nccls_queues_do_not_block_each_other(monkeypatch, schedule, chunks, ranks):
    """Gloo buffers every message; NCCL, with messages larger than its buffers, does not."""
    programs = messages(monkeypatch, schedule, ranks, 2 * ranks, chunks)
    assert not deadlocks(programs, lambda message: message[1:])  # a group for each edge, as `connect` makes them
    # One group for each direction, as it would be simpler: enough for a line, not for a circle.
    assert deadlocks(programs, lambda message: message[1]) == (schedule == "interleaved")


def test_every_edge_has_a_group_of_its_two_ranks(group):
    for rank, edges in enumerate(group(3)(ON_RANKS.edges_of)):
        before, after = (rank - 1) % 3, (rank + 1) % 3
        assert edges == {
            (0, rank): sorted([rank, after]), (0, before): sorted([before, rank]),
            (1, rank): sorted([rank, before]), (1, after): sorted([after, rank]),
        }  # fmt: skip
