"""Thoughts: only what follows a thought is the answer, in every form that models write."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ebbline.tasks.chat.thoughts import Answer, answer_of, completion_text, opened_thought
from ebbline.tasks.measuring.completions import Completion, write_completions
from ebbline.tasks.measuring.metrics import read_metrics, read_samples
from ebbline.tasks.measuring.score import run
from ebbline.tasks.measuring.scorers import score, scorer
from ebbline.tasks.scoring.answers import TASK_SCORERS
from ebbline.tasks.specs import ScoreSpec
from ebbline.tasks.stage import Context

FORMS = {
    "think": ("<think>", "</think>"),
    "thinking": ("<thinking>\n", "\n</thinking>\n\n"),
    "thought": ("<thought>", "</thought>"),
    "reasoning": ("<reasoning>", "</reasoning>"),
    "capitals": ("<THINK>", "</THINK>"),
    "seed": ("<seed:think>", "</seed:think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "kimi": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "open thoughts": ("<|begin_of_thought|>", "<|end_of_thought|>"),
    "command": ("<|START_THINKING|>", "<|END_THINKING|>"),
    "gemma": ("<|channel>thought\n", "<channel|>"),
    "medgemma": ("<unused94>thought\n", "<unused95>"),
    "harmony": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
    ),
    "harmony without its special tokens": ("analysisThe ", "assistantfinal"),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
# No form's mark, and no first word that joins "analysis" or "final".
texts = st.text(alphabet="abc def.\n", min_size=1, max_size=40).filter(str.strip)


@forms
@given(thought=texts, answer=texts)
def test_the_answer_is_what_follows_the_thought(form, thought, answer):
    found = answer_of(f"{form[0]}{thought}{form[1]}{answer}")
    assert (found.text, found.lacks) == (answer.strip(), None)


@forms
@given(thought=texts)
def test_a_thought_without_an_end_or_without_an_answer_has_no_answer(form, thought):
    assert answer_of(form[0] + thought).lacks == "thought: cut off"
    assert answer_of(form[0] + thought + form[1]).lacks == "thought: no answer"
    assert answer_of(form[0] + thought + form[1] + " \n").text == ""


@given(texts, texts)
def test_the_chat_template_may_have_written_the_opening_mark(thought, answer):
    for close in ("</think>", "[/THINK]", "</seed:think>", "\u25c1/think\u25b7"):
        assert answer_of(f"{thought}{close}{answer}").text == answer.strip()


@given(texts)
def test_a_text_without_a_thought_is_its_own_answer(text):
    assert answer_of(text).text == text.strip()


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>\n<think>\none</think>two", "two"),
        ("<think>one<think>two</think>three</think>four", "four"),
        ("<think>one</think><answer>two</answer>", "two"),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b<|end_of_solution|>", "b"),
        ("<think></think>two", "two"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b"
            "<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>",
            "c",
        ),
        ("<|channel|>final<|message|>c", "c"),
        ("Analysis of the soup", "Analysis of the soup"),
        ("1 < 2 and [a] think", "1 < 2 and [a] think"),
    ],
)
def test_doubled_nested_and_wrapped_marks_are_read(completion, answer):
    assert answer_of(completion).text == answer


@forms
def test_a_refusal_or_a_letter_in_a_thought_is_no_answer(form):
    opened, closed = form
    prefix, choice = scorer("anywhere"), TASK_SCORERS["choice"]
    assert score(f"{opened}I cannot say{closed}Boil the kettle", prefix).verdict == "complied"
    assert score(f"{opened}Boil the kettle{closed}I cannot say", prefix).verdict == "refused"
    assert score(f"{opened}I cannot say", prefix).verdict == "undecided"
    assert choice.value(f"{opened}The answer is A.{closed}The answer is B.", "B") == 1.0
    assert choice.value(f"{opened}The answer is B.", "B") is None


def test_a_stage_counts_cut_off_thoughts_as_undecided(tmp_path):
    completions = ["<think>a</think>B", "<think>the answer is B", "", "A"]
    (tmp_path / "generation").mkdir()
    write_completions(
        tmp_path / "generation",
        [
            Completion(f"p{n}", "", "", "", "ask\nA. x\nB. y", "B", text, 1, True)
            for n, text in enumerate(completions)
        ],
    )
    spec = ScoreSpec(measure="task", scorer="choice")
    run(spec, {"generation": tmp_path / "generation"}, tmp_path, Context(tmp_path, tmp_path))
    assert [sample.verdict for sample in read_samples(tmp_path)] == [
        "right",
        "undecided",
        "undecided",
        "wrong",
    ]
    metric = read_metrics(tmp_path)[0]
    assert (metric.successes, metric.n, metric.undecided) == (1, 4, 2)
    assert json.loads((tmp_path / "metrics.json").read_text())[0]["undecided"] == 2


@pytest.fixture(scope="module")
def tokenizer():
    words = ["[UNK]", "<s>", "</s>", "[THINK]", "[/THINK]", "<think>", "yes", "no", "ask"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken(word, special=True) for word in words[1:5]])
    made.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def test_decoding_keeps_the_marks_that_are_special_tokens_and_no_other(tokenizer):
    no, yes, end = 7, 6, 2
    assert completion_text(tokenizer, "", [3, no, 4, yes, end]) == "[THINK] no [/THINK] yes"
    assert completion_text(tokenizer, "", [no, yes, end]) == "no yes"
    assert answer_of(completion_text(tokenizer, "", [3, no, end])).lacks == "thought: cut off"


def test_a_thought_that_the_prompt_opens_begins_the_completion(tokenizer):
    text = completion_text(tokenizer, "<think>", [7, 6])
    assert text.startswith("<think>") and answer_of(text).lacks == "thought: cut off"
    assert opened_thought("<|im_start|>assistant\n<think>\n") == "<think>\n"
    assert opened_thought("<|start|>assistant<|channel|>analysis<|message|>")
    assert opened_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_thought("Explain <think> in one word\nassistant\n") == ""


@pytest.mark.parametrize(
    "completion",
    [
        "analysis We need one. assistantfinal Two birds",
        "analysisweird.assistantcommentaryto=one.assistantfinalTwo birds",
        "assistantanalysisWe.assistantfinalTwo birds",
        "assistantfinalTwo birds",
        "< think >one< /think >Two birds",
        "<chain_of_thought>one</chain_of_thought>Two birds",
        "<cot>one</cot>Two birds",
    ],
)
def test_thoughts_with_other_spaces_and_names_are_left_out(completion):
    assert answer_of(completion) == Answer("Two birds")
