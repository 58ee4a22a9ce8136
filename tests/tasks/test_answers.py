"""Task scorers: a letter, a number or words are read from a completion, or it is undecided."""

import re
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from ebbline.tasks.data.prompts import read_prompts
from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.scoring.answers import TASK_SCORERS
from ebbline.tasks.scoring.letters import chosen_letter, letters_of, reference_letter
from ebbline.tasks.scoring.numbers import number, reference_number
from ebbline.tasks.scoring.overlap import rouge_l
from ebbline.tasks.scoring.words import words_of
from tests.tiny import write_lines

FOUR = "Which bird?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
THREE = "Which bird? (A) one (B) two (C) three"


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ("I think the answer is B.", "B"),
        ("It's C.", "C"),
        ("It\u2019s C.", "C"),
        ("R\u00e9ponse : C", "C"),
        ("Re\u0301ponse\u00a0: C", "C"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B)", "B"),
        ("Answer: option (c)", "C"),
        (r"\boxed{D}", "D"),
        (r"So $\boxed{\text{B}}$.", "B"),
        ("The correct answer is not A but B", "B"),
        ("The answer isn't A, it's B.", "B"),
        ("\uff22", "B"),
        ("\u200bB\u00a0", "B"),
        ("b", "B"),
        ("B. two", "B"),
        ("B: two\n\nA is wrong because one bird is too few.", "B"),
        ("A is wrong. The answer is C.", "C"),
        ("The answer is A because there is one bird", "A"),
        ("B is the correct answer, as C is no bird", "B"),
        ("The answer is B rather than C", "B"),
        ("**Answer:** B", "B"),
        ("\u7b54\u6848\u662fB\u3002", "B"),
        ("\u6b63\u89e3\u306f D \u3067\u3059", "D"),
        ("\u041e\u0442\u0432\u0435\u0442: B", "B"),
        ("La respuesta correcta es la B", "B"),
        ("Die richtige Antwort ist C.", "C"),
        ("A) one\nB) two\nC) three\nThe answer is C", "C"),
        ("B\n\nQuestion: the next\nAnswer: C", "B"),
        ("Two birds (B)", "B"),
        ("I'd go with option b.", "B"),
    ],
)
def test_the_letter_that_a_completion_gives_is_read(completion, letter):
    assert chosen_letter(completion, FOUR) == letter


@pytest.mark.parametrize(
    "completion",
    [
        "A good idea",
        "I",
        "I am not sure.",
        "A man walks",
        "C'est la vie",
        "Vitamin C",
        "C++ is a language",
        "U.S. policy",
        "Plan B is best",
        "e.g. this one",
        "A-C",
        "The answer is A good one",
        "the answer is a difficult one",
        "The answer is either A or B.",
        "B or C",
        "A, B and C are birds",
        "The answer is not B.",
        "Definitely not B",
        "The wrong answer is A",
        "Answer: Dog",
        "None of the above",
        "E",
        "The answer is E",
        r"\boxed{E}",
        r"\boxed{A} or \boxed{B}",
    ],
)
def test_articles_pronouns_denied_and_several_letters_are_no_answer(completion):
    assert chosen_letter(completion, FOUR) is None
    for answer in "ABCD":
        assert TASK_SCORERS["choice"].value(completion, answer, FOUR) is None


frames = st.sampled_from(
    ["{}", "({})", "**{}**", "{}.", "{})", "Answer: {}", "The answer is {}.", "It's {}.", "[{}]",
     "\u7b54\u6848\uff1a{}", "R\u00e9ponse : {}", r"\boxed{{{}}}", "**Answer:** ({})", "> {}",
     "I believe the correct option is {}.", "So the answer is **{}**."]
)  # fmt: skip


@given(st.sampled_from("ABCDEFGH"), st.sampled_from("ABCDEFGH"), frames)
def test_only_the_items_letters_count(letter, last, frame):
    options = [chr(code) for code in range(65, max(66, ord(last)) + 1)]
    prompt = "Which?\n" + "\n".join(f"{each}) bird" for each in options)
    assert letters_of(prompt) == set(options)
    expected = letter if letter in options else None
    assert chosen_letter(frame.format(letter), prompt) == expected
    wide = frame.format(chr(ord(letter) + 0xFEE0))
    assert chosen_letter(wide, prompt) == expected or "boxed" in frame


def test_an_items_letters_are_those_of_its_last_list():
    assert letters_of("Q\nA. x\nB. y\nC. z\nAnswer: C\n\nQ\nA. x\nB. y\nAnswer:") == {"A", "B"}
    assert letters_of(THREE) == {"A", "B", "C"}
    assert len(letters_of("Which bird?")) == 26


@pytest.mark.parametrize("answer", ["two", "1", "AB", "B. two", "", "E", "\u0411"])
def test_a_reference_that_is_no_letter_of_the_item_is_an_error_with_its_file_and_line(
    tmp_path, answer
):
    path = write_lines(
        tmp_path / "eval.jsonl",
        [{"prompt": FOUR, "answer": "B"}, {"prompt": f"Again. {FOUR}", "answer": answer}],
    )
    first, second = read_prompts(path).prompts
    require = TASK_SCORERS["choice"].require
    require(first.answer, first.text, first.where)
    with pytest.raises(EvaluationError, match=re.escape(f"{path}:2: its `answer`")) as error:
        require(second.answer, second.text, second.where)
    assert "bird" not in str(error.value)
    assert reference_letter(" (b). ", FOUR, "x") == "B"


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("1,234.5", "1234.5", 1),
        ("1.234,5", "1234.5", 1),
        ("1\u00a0234,5", "1234.5", 1),
        ("1'234.50", "1234.5", 1),
        ("12,34,567", "1234567", 1),
        ("So 3 + 4 = 7.\n#### 12", "#### 12", 1),
        ("The answer is 12, as 9 + 3 = 12 and 20 > 12", "12", 1),
        ("We have 3 kettles, 4 cups, and 7 in all", "7", 1),
        (r"\boxed{\frac{3}{4}}", "0.75", 1),
        ("1 1/2", "1.5", 1),
        ("\u00bd", "0.5", 1),
        ("50%", "0.5", 1),
        ("50%", "50", 1),
        ("$-5", "-5", 1),
        ("\u22125", "-5", 1),
        ("5", "-5", 0),
        ("3 - 5 = -2", "-2", 1),
        ("5 kilometers", "5 km", 1),
        ("$5.00", "5 dollars", 1),
        ("10\u00b2", "102", 0),
        ("1.5 x 10^3", "1500", 1),
        ("\uff11\uff12", "12", 1),
        ("0.33", "1/3", 1),
        ("1.234", "1234", None),
        ("1,234", "1.234", None),
        ("0.5%", "0.5", None),
        ("5 m", "5 km", None),
        ("twelve", "12", None),
        ("", "12", None),
    ],
)
def test_a_number_is_right_wrong_or_undecided(completion, answer, value):
    assert TASK_SCORERS["number"].value(completion, answer) == value


@given(st.integers(-(10**7), 10**7), st.integers(0, 99), st.sampled_from("abcd"))
def test_the_separators_of_a_number_do_not_matter(whole, cents, style):
    written = f"{whole:,}.{cents:02d}"
    separators = {"a": ",.", "b": ".,", "c": "\u202f,", "d": "'."}[style]
    written = written.translate(str.maketrans(",.", separators))
    sign = "-" if whole < 0 else ""
    assert number(f"It is {written}", f"{sign}{abs(whole)}.{cents:02d}") == 1.0
    assert number(f"It is {written}", f"{sign}{abs(whole) + 1}.{cents:02d}") == 0.0


@given(st.fractions(max_denominator=50), st.fractions(max_denominator=50))
def test_fractions_are_compared_exactly(one, other):
    assert number(f"Answer: {one}", str(other)) == float(Fraction(one) == Fraction(other))


parts = st.lists(
    st.sampled_from(
        [
            *"0123456789.,-+/%$ \n()ABCI'",
            "1,234",
            "####",
            r"\boxed{",
            "}",
            r"\frac{1}{",
            "e9",
            "answer",
        ]
    ),
    max_size=30,
).map("".join)


@given(st.one_of(st.text(max_size=60), parts), st.sampled_from(["5", "1,234.5", "-3/4", "50%"]))
def test_any_completion_is_right_wrong_or_undecided(completion, answer):
    assert TASK_SCORERS["number"].value(completion, answer) in (0.0, 1.0, None)
    assert TASK_SCORERS["choice"].value(completion, "B", FOUR) in (0.0, 1.0, None)
    assert TASK_SCORERS["exact"].value(completion, answer) in (0.0, 1.0, None)
    assert 0.0 <= rouge_l(completion, answer) <= 1.0


@pytest.mark.parametrize(
    "loop", ["1", "1,", "1 ", "1,234", r"\boxed{", "answer ", "the answer is "]
)
def test_a_long_loop_is_read_and_is_no_number(loop):
    assert number(loop * 5000, "7") in (0.0, None)
    assert chosen_letter(loop * 2000, FOUR) is None


@pytest.mark.parametrize("answer", ["twelve", "3 and 4", ""])
def test_a_reference_that_is_not_one_number_is_an_error(answer):
    with pytest.raises(EvaluationError, match="eval.csv:3: its `answer` holds"):
        reference_number(answer, "eval.csv:3")


english = st.text(alphabet=st.characters(max_codepoint=127), max_size=60)
sentences = st.lists(
    st.sampled_from(
        "the kettle's kettles boiled boiling don't a_b 3.5 running ponies Soup".split()
    ),
    max_size=20,
).map(" ".join)


@given(st.one_of(english, sentences), st.one_of(english, sentences))
def test_rouge_l_of_ascii_text_is_that_of_rouge_score(one, other):
    library = RougeScorer(["rougeL"], use_stemmer=True).score(other, one)["rougeL"].fmeasure
    assert rouge_l(one, other) == pytest.approx(library)


SCRIPTS = {
    "Chinese": "\u6c34\u58f6\u91cc\u7684\u6c34\u5f00\u4e86",
    "Japanese": "\u3084\u304b\u3093\u306e\u6e6f\u304c\u6cb8\u3044\u305f",
    "Thai": "\u0e01\u0e32\u0e19\u0e49\u0e33\u0e40\u0e14\u0e37\u0e2d\u0e14",
    "Arabic": "\u0627\u0644\u0645\u0627\u0621 \u0641\u064a \u0625\u0628\u0631\u064a\u0642",
    "Hindi": "\u0915\u0947\u0924\u0932\u0940 \u092e\u0947\u0902 \u092a\u093e\u0928\u0940",
    "Russian": "\u0447\u0430\u0439\u043d\u0438\u043a \u0432\u0441\u043a\u0438\u043f\u0435\u043b",
    "French": "la th\u00e9i\u00e8re est pr\u00eate",
    "Korean": "\uc8fc\uc804\uc790\uac00 \ub053\ub294\ub2e4",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=list(SCRIPTS))
def test_rouge_l_reads_every_script_in_every_unicode_form(text):
    words = words_of(text)
    assert len(words) > 1
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert rouge_l(unicodedata.normalize(form, text), text) == 1.0
    half = text[: len(text) // 2]
    assert 0.0 < rouge_l(half, text) < 1.0
    assert rouge_l("kettle", text) == 0.0


def test_marks_stay_with_their_letter_and_vowel_signs_of_arabic_may_be_left_out():
    assert words_of("cafe\u0301 na\u00efve") == ["caf\u00e9", "na\u00efve"]
    assert words_of("\u0e19\u0e49\u0e33") == ["\u0e19\u0e49\u0e4d", "\u0e32"]
    assert rouge_l("\u0645\u064e\u0627\u0621", "\u0645\u0627\u0621") == 1.0
    assert words_of("3\u5e74kettle") == ["3", "\u5e74", "kettle"]


def test_a_rouge_reference_without_a_word_is_an_error():
    with pytest.raises(EvaluationError, match="x.csv:2: its `answer` has no letter or digit"):
        TASK_SCORERS["rouge_l"].require("...", "", "x.csv:2")


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        ('{"answer": "B"}', "B"),
        ('{"correct_option": "B", "reason": "A tarn is small"}', "B"),
        ('```json\n{"answer": "B"}\n```', "B"),
        ("```text\nB\n```", "B"),
        (r"\[\boxed{\text{B. two}}\]", "B"),
        (r"The answer is \(B\).", "B"),
        ("| Question | Answer |\n|---|---|\n| 1 | B |", "B"),
        ("1) B", "B"),
        ("Let me think. B", "B"),
        ("It must be B.", "B"),
        ("La risposta \u00e8 B.", "B"),
        ("A resposta \u00e9 B.", "B"),
        ("Die Antwort lautet B.", "B"),
        ("Prawid\u0142owa odpowied\u017a to B.", "B"),
        ("\u0110\u00e1p \u00e1n \u0111\u00fang l\u00e0 B", "B"),
        ("\u3010\u7b54\u6848\u3011B", "B"),
        ("\u7b54\u3048\u306f\u300cB\u300d\u3067\u3059", "B"),
        ("\uc815\ub2f5\uc740 B\uc785\ub2c8\ub2e4.", "B"),
        ("\u0938\u0939\u0940 \u0909\u0924\u094d\u0924\u0930 B \u0939\u0948", "B"),
        (
            "\u0627\u0644\u0625\u062c\u0627\u0628\u0629 "
            "\u0627\u0644\u0635\u062d\u064a\u062d\u0629 \u0647\u064a B.",
            "B",
        ),
        ("\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d B", "B"),
        ("\u7b54\u3048\u306fB\u3067\u306f\u3042\u308a\u307e\u305b\u3093", None),
        ("\uc815\ub2f5\uc740 B\uac00 \uc544\ub2d9\ub2c8\ub2e4", None),
        ("B. Wait, no, C.", None),
        ("Answer: none of A, B, C", None),
        ("I doubt the answer is B.", None),
        ("B\nC\nD", None),
        ("| one | A |\n| two | B |", None),
    ],
)
def test_letters_in_json_code_latex_tables_and_many_languages(completion, letter):
    assert chosen_letter(completion, FOUR) == letter


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("The answer is 3 + 5 = 8.", "8", 1.0),
        ("Total: 3 x 4 = 12 birds", "12", 1.0),
        ("The result of 3 + 5 is 8", "8", 1.0),
        ("The total of 3 and 5 is 8.", "8", 1.0),
        ("The answer is 18 = 9 * 2", "18", 1.0),
        ("The answer is 3 + 5", "3", None),
        ("10-12", "12", None),
        ("2023-01-05", "5", None),
        ("12:30", "30", None),
        ("12, not 13", "12", 1.0),
        ("12, not 13", "13", 0.0),
        ("The answer is not 12", "12", None),
        ("2 million", "2000000", 1.0),
        ("$2k", "2000", 1.0),
        ("3\u4e07", "30000", 1.0),
        ("2", "2 million", None),
        ("1\u00bd", "1.5", 1.0),
        ("10^3", "1000", 1.0),
        ("10\u00b3", "1000", 1.0),
        ("2**3", "8", 1.0),
        ("10^999", "1", None),
        (r"\boxed{1{,}234}", "1234", 1.0),
        (r"\boxed{\frac12}", "0.5", 1.0),
        (r"\boxed{2, 3}", "3", None),
        ("\u0661\u066c\u0662\u0663\u0664", "1234", 1.0),
        ("\u0661\u0662\u066b\u0665", "12.5", 1.0),
        ("8\n\nQuestion: What is 2 + 3?\nAnswer: 5", "8", 1.0),
    ],
)
def test_calculations_ranges_denials_and_magnitudes(completion, answer, value):
    assert number(completion, answer) == value


@given(st.integers(1, 999), st.integers(1, 999), st.sampled_from(["{}", "The answer is {}."]))
def test_the_result_of_a_calculation_is_its_answer_and_an_operand_never(one, other, frame):
    calculation = f"{one} + {other}"
    assert number(frame.format(f"{calculation} = {one + other}"), str(one + other)) == 1.0
    assert number(frame.format(calculation), str(one)) is None
    assert number(frame.format(calculation), str(other)) is None
