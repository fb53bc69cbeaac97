"""Questions: SQuAD's format, what counts as a target, contexts that are too long, and the official scores."""

import json

import pytest
import torch

from common.data import standard_library_files
from finetuning import squad
from finetuning.models import load_hf_config
from finetuning.scores import exact_match, f1, most_frequent_answer, score
from finetuning.squad import (
    Question,
    QuestionsConfig,
    normalize,
    question_sets,
    questions_of,
    read_questions,
    standard_library_questions,
)
from finetuning.tokens import QuestionDataset, left_padded, load_tokenizer, prompt_of

CONTEXT = "The river Oder, 854 km long, flows north."
QUESTION = Question("1", CONTEXT, "Which river?", ("Oder", "the river Oder"), CONTEXT.index("Oder"))
NOTHING = Question("2", CONTEXT, "Which lake?", ())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(None)


def tree(**changes):
    """A data set of one question; `changes` replace or (None) remove entries of it."""
    entry = {"id": "1", "question": "Which river?", "answers": [{"text": "Oder", "answer_start": 10}]} | changes
    entry = {name: value for name, value in entry.items() if value is not None}
    return {"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [entry]}]}]}


# ------------------------------------------------------------------------------------------------------- questions


def test_both_versions_of_the_format():
    [question] = questions_of(tree(), "here")
    assert question == Question("1", CONTEXT, "Which river?", ("Oder",), 10)
    plausible = [{"text": "Oder", "answer_start": 10}]  # what version 2.0 keeps beside a question without answer
    [question] = questions_of(tree(is_impossible=True, answers=[], plausible_answers=plausible), "here")
    assert question.answers == ()


@pytest.mark.parametrize(("data", "words"), [
    (tree(answers=[{"text": "Oder", "answer_start": 9}]), "question 1: the answer 'Oder' is not at answer_start = 9"),
    (tree(answers=[{"text": "854", "answer_start": -1}]), "answer_start = -1"),
    (tree(answers=[{"text": "", "answer_start": 3}]), "the answer '' is not at"),
    (tree(answers=None), "is not in SQuAD's format (KeyError: 'answers')"),
    (tree(question=None), "is not in SQuAD's format (KeyError: 'question')"),
    ([{"question": "Which river?"}], "is not in SQuAD's format (TypeError"),
    ({"data": []}, "holds no questions"),
], ids=["shifted", "negative", "empty", "no answers", "no question", "another format", "nothing"])  # fmt: skip
def test_a_file_that_is_not_squad(tmp_path, capsys, data, words):
    (tmp_path / "some.json").write_text(json.dumps(data))
    with pytest.raises(SystemExit) as ended:
        read_questions(str(tmp_path / "some.json"))
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "some.json" in message
    assert words in message


def test_a_file_that_is_not_json(tmp_path, capsys):
    (tmp_path / "some.json").write_bytes(b"{")
    (tmp_path / "bytes.json").write_bytes(b"\xff{")
    for name, words in {"some": "not valid JSON", "bytes": "expected text in UTF-8", "none": "No such file"}.items():
        path = tmp_path / f"{name}.json"
        with pytest.raises(SystemExit):
            read_questions(str(path))
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module", params=["a part", pytest.param("all", marks=pytest.mark.slow)])
def embedded(request, tmp_path_factory):
    """The two embedded sets as files; those of a part of the standard library are made in a second."""
    folder, files = tmp_path_factory.mktemp("embedded"), standard_library_files()
    if request.param == "a part":
        files = [path for number, path in enumerate(files) if number % 8 == 0 or path.name == "textwrap.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squad, "standard_library_files", lambda: files)
        parts = standard_library_questions()
    for name, part in zip(("train.json", "validation.json"), parts, strict=True):
        (folder / name).write_text(json.dumps(part))
    return folder, {"a part": 40, "all": 300}[request.param]


def test_the_standard_library_asks_about_itself(embedded):
    """Spans are checked by the reader; that they are the defaults is checked against the functions themselves."""
    import inspect
    import textwrap

    folder, least = embedded
    sets = [read_questions(str(folder / name)) for name in ("train.json", "validation.json")]
    assert len(sets[0]) > 3 * len(sets[1]) > 3 * least
    assert not {q.context for q in sets[0]} & {q.context for q in sets[1]}
    for part in sets:
        assert 0.1 < sum(not q.answers for q in part) / len(part) < 0.5
    signature = f"fill{inspect.signature(textwrap.fill)}"
    about = {q.question: q.answers for part in sets for q in part if q.context.startswith(signature)}
    assert about == {"What is the default of width?": ("70",), "What is the default of text?": ()}


def test_validation_samples(embedded):
    folder, least = embedded
    paths = str(folder / "train.json"), str(folder / "validation.json")
    few = question_sets(QuestionsConfig(*paths, validation_samples=7))[1]
    everything = question_sets(QuestionsConfig(*paths, validation_samples=0))[1]
    assert len(few) == 7
    assert len({q.id for q in few} & {q.id for q in everything}) == 7
    assert len(everything) > least
    assert [q.id for q in few] == [everything[i * len(everything) // 7].id for i in range(7)]  # evenly spread


# ---------------------------------------------------------------------------------------------------------- tokens


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes(tokenizer):
    ids = tokenizer("é\n")["input_ids"]
    assert len(tokenizer) == 257
    assert len(ids) == 3
    assert tokenizer.eos_token_id == 256
    assert text_of(tokenizer, [*ids, 256]) == "é\n"


def test_only_the_answer_counts(tokenizer):
    dataset = QuestionDataset([QUESTION, NOTHING], tokenizer, 96, training=True)
    for (tokens, targets), question, answer in zip(dataset, (QUESTION, NOTHING), (" Oder", ""), strict=False):
        prompt = f"{CONTEXT}\nQuestion: {question.question}\nAnswer:"
        counted = targets != -100
        assert tokens.shape == targets.shape == (96,)
        assert text_of(tokenizer, targets[counted]) == answer
        assert targets[counted][-1] == 256
        assert int(counted.sum()) == len(answer) + 1
        first = int(counted.nonzero()[0])
        assert text_of(tokenizer, tokens[: first + 1]) == prompt  # the last token of the prompt predicts the first
        assert torch.equal(tokens[first + 1 : first + 1 + len(answer)], targets[first : first + len(answer)])
        assert (tokens[first + 1 + len(answer) :] == 256).all()
    assert dataset.describe().startswith("2 samples, 7 answer tokens, 23% of 96 tokens a sample padding; 0 contexts")


def test_a_long_context_is_shortened_around_its_answer(tokenizer):
    """At every length the answer is whole and inside what is kept; where that cannot be, the sample is refused."""
    context = "x" * 50 + " north 854 km " + "y" * 50
    question = Question("1", context, "How long?", ("854 km",), context.index("854"))
    fixed = len("\nQuestion: How long?\nAnswer:") + len(" 854 km")
    for length in range(20, 160):
        kept = min(114, length - fixed)  # one target more than tokens, the end
        if kept < 6:
            with pytest.raises(SystemExit):
                QuestionDataset([question], tokenizer, length, training=True)
            dataset = QuestionDataset([question, NOTHING], tokenizer, length, True) if length > 35 else None
            assert dataset is None or dataset.refused == 1
            continue
        dataset = QuestionDataset([question], tokenizer, length, training=True)
        tokens, targets = dataset[0]
        assert (dataset.refused, dataset.shortened) == (0, int(kept < 114))
        prompt = text_of(tokenizer, tokens).split("\nQuestion:")[0]
        assert len(prompt) == kept
        assert prompt in context
        assert "854 km" in prompt
        assert text_of(tokenizer, targets[targets != -100]) == " 854 km"


def test_nobody_looks_at_the_answer_in_evaluation(tokenizer):
    for start in (10, 30):
        question = Question("1", CONTEXT, "Which?", (CONTEXT[start : start + 4],), start)
        prompt, cut = prompt_of(question, tokenizer, 40, training=False)
        assert cut
        assert len(prompt) == 40
        assert text_of(tokenizer, prompt) == CONTEXT[:15] + "\nQuestion: Which?\nAnswer:"
    prompt, cut = prompt_of(QUESTION, tokenizer, 12, training=False)  # not even the question fits: its end
    assert (text_of(tokenizer, prompt), cut) == ("ver?\nAnswer:", True)


def test_prompts_end_together():
    tokens, mask = left_padded([[1, 2, 3], [4]], 9, torch.device("cpu"))
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(("text", "expected"), [
    ("The  Oder!", "oder"),
    ("an apple a day", "apple day"),
    ("theatre Ana", "theatre ana"),
    ("U.S.A.", "usa"),  # punctuation goes without leaving a space
    ("a-b", "ab"),  # … and before the articles: "a" is none here
    ("x-the y", "xthe y"),
    ("'", ""),
    ("the", ""),
    ("„Oder“", "„oder“"),  # ASCII punctuation only
    ("two\n words\t", "two words"),
])  # fmt: skip
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(("answer", "gold", "exact", "overlap"), [
    ("the Oder", "Oder", 1, 1),
    ("river Oder", "Oder", 0, 2 * 0.5 * 1 / 1.5),
    ("Oder Oder", "Oder Oder Neisse", 0, 2 * 2 / 5),  # words are counted: Oder is in common twice
    ("Oder Oder Neisse", "Oder Neisse Neisse", 0, 2 / 3),  # here Oder and Neisse once each
    ("Elbe", "Oder", 0, 0),
    ("", "Oder", 0, 0),
    ("Oder", "", 0, 0),
    ("", "", 1, 1),
    ("the", "", 1, 1),
])  # fmt: skip
def test_scores_of_one_answer(answer, gold, exact, overlap):
    assert exact_match(answer, gold) == exact
    assert f1(answer, gold) == pytest.approx(overlap, abs=1e-12)


def test_score_by_hand():
    """The best of the right answers; nothing is right where there is none; an article alone is no right answer."""
    articles = Question("3", CONTEXT, "Which word is first?", ("The", "river"), 0)
    asked = [QUESTION, QUESTION, NOTHING, NOTHING, articles, articles]
    answers = ["river Oder", "Oder flows", "", "Oder", "", "River."]
    # 0: as "the river Oder". 1: with "Oder" 2 · (1/2 · 1) / (3/2) = 2/3. 4: "The" does not count, "river" does.
    assert score(answers, asked) == (pytest.approx(100 * 3 / 6), pytest.approx(100 * (1 + 2 / 3 + 1 + 0 + 0 + 1) / 6))
    with pytest.raises(ValueError, match="longer"):
        score(answers[:-1], asked)


def test_the_most_frequent_answer():
    assert most_frequent_answer([QUESTION, QUESTION, NOTHING]) == "Oder"
    assert most_frequent_answer([QUESTION, NOTHING, NOTHING]) == ""


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 257,
}


@pytest.mark.parametrize(("kind", "changes", "words"), [
    ("llama", {}, None),
    ("llama", {"auto_map": {"AutoModel": "code.Model"}}, None),  # transformers' own Llama is taken, the code is not run
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is of LlamaForSequenceClassification"),
    ("bert", {"architectures": ["BertForMaskedLM"]}, "is of BertForMaskedLM"),
    ("bert", {}, "bert looks at later tokens"),
    ("bert", {"architectures": ["BertLMHeadModel"]}, "bert looks at later tokens"),
    ("bert", {"architectures": ["BertLMHeadModel"], "is_decoder": True}, None),
    ("xlnet", {"d_model": 16, "n_head": 2, "n_layer": 1, "d_head": 8}, "xlnet looks at later tokens"),
    ("distilbert", {}, "is of distilbert"),
    ("t5", {"architectures": ["T5ForConditionalGeneration"]}, "t5 is an encoder with a decoder"),
    ("bart", {}, "bart is an encoder with a decoder"),
    ("llama", {"attn_implementation": "flash_attention_2"}, "flash_attention_2 now, to sdpa"),
    ("llama", {"num_attention_heads": 3}, "config.json cannot be used"),
    ("own", {"auto_map": {"AutoConfig": "code.Config"}}, "asks for code of its own (auto_map)"),
    ("own", {}, "config.json cannot be used"),
])  # fmt: skip
def test_models_that_are_no_causal_ones(tmp_path, monkeypatch, capsys, kind, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": kind} | changes))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "code.py").write_text("open('it_ran', 'w')")
    if words is None:
        assert load_hf_config(str(tmp_path), 8).model_type == kind
    else:
        with pytest.raises(SystemExit) as ended:
            load_hf_config(str(tmp_path), 8)
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2
        assert len(lines) == 1 and words in lines[0] and len(lines[0]) < 500, lines
    assert not (tmp_path / "it_ran").exists()


def test_an_index_that_leads_elsewhere(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"model_type": "llama"}))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret"}}')
    with pytest.raises(SystemExit):
        load_hf_config(str(tmp_path), 8)
    assert "index.json names ../../secret; expected files of the same folder" in capsys.readouterr().err
