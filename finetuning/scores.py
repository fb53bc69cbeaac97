"""Exact match and F1, as SQuAD's official evaluation has them."""

import collections

from finetuning.squad import Question, normalize


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if both are the same when normalized, otherwise 0."""
    return float(normalize(answer) == normalize(gold))


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall over the normalized words; without words on one side, 1 if the
    other has none either, otherwise 0."""
    ours, theirs = normalize(answer).split(), normalize(gold).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def score(answers: list[str], questions: list[Question]) -> tuple[float, float]:
    """Return exact match and F1 in per cent, as SQuAD's official evaluation (2.0, without a no-answer threshold) does.

    Each question counts with the best of its right answers (those that are not empty when normalized). Where there is
    none, saying nothing is right.
    """
    totals = [0.0, 0.0]
    for answer, question in zip(answers, questions, strict=True):
        golds = [gold for gold in question.answers if normalize(gold)] or [""]
        totals[0] += max(exact_match(answer, gold) for gold in golds)
        totals[1] += max(f1(answer, gold) for gold in golds)
    return 100 * totals[0] / len(questions), 100 * totals[1] / len(questions)


def most_frequent_answer(questions: list[Question]) -> str:
    """Return the most frequent right answer; "" is no answer. A model that says it always has learned nothing more."""
    return collections.Counter(q.answers[0] if q.answers else "" for q in questions).most_common(1)[0][0]


def score_by_answer(answers: list[str], questions: list[Question], most: int = 5) -> list[tuple[str, int, int]]:
    """Return (right answer, times given, questions with it) for the `most` frequent right answers, and for the rest."""
    golds = [repr(question.answers[0]) if question.answers else "no answer" for question in questions]
    frequent = [gold for gold, _ in collections.Counter(golds).most_common(most)]
    rows = {name: [0, 0] for name in (*frequent, "another")}
    for answer, question, gold in zip(answers, questions, golds, strict=True):
        row = rows[gold if gold in frequent else "another"]
        row[0] += int(score([answer], [question])[0] == 100)
        row[1] += 1
    return [(name, given, total) for name, (given, total) in rows.items() if total]
