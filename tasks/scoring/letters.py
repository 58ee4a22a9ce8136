"""The letter that answers a multiple-choice item.

Invariant: the letter that a completion clearly gives, or None. A letter counts where the completion
names it as its answer: in \\boxed{}, in brackets, alone at the start, or after words such as "the
answer is". Articles, pronouns, denied letters and letters that are not the item's never count.
Where two letters are left, there is no answer.
"""

import re

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.scoring.text import (
    before_next_item,
    plain,
    without_accents,
    without_emphasis,
)

# A letter by itself: not in a word, an abbreviation (U.S., e.g.), a formula or a range (A-C).
_BEFORE = r"(?<![^\W_])(?<![^\W_]['.+#&])(?<![\u00b0+#&$\\])"
_AFTER = r"(?![^\W_])(?!'[^\W_])(?![+#&\u00b0%])(?!-[^\W_])(?!\.[^\W_](?![^\W_]))"
_WIDE = (
    r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # kana, ideographs, hangul: no space before a letter
)

_OPTIONS = re.compile(r"(?:(?<=\s)|^)[(\[*]*([A-Za-z])[*]*[).:\]](?=\s|\*)|\(([A-Za-z])\)")
_REFERENCE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")

_BOXED = re.compile(
    r"\\(?:boxed|fbox)\s*\{\s*(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\W*([A-Za-z])"
    r"(?:[).:][^{}]*|\W*)\}"
)
_LATEX = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)?)\s*\{([^{}]*)\}|\$([^$\s]{1,8})\$"
    r"|\\\(\s*([^\\\s]{1,8})\s*\\\)"
)


def _either(phrases: str) -> str:
    """A pattern for any of the phrases, which commas and line ends separate; longest first."""
    found = {plain(each.strip()) for each in re.split(r"[,\n]", phrases) if each.strip()}
    return (
        "(?:" + "|".join(map(re.escape, sorted(found, key=lambda each: (-len(each), each)))) + ")"
    )


# Words by language, in lower case and without accents.
_ANSWER = _either(
    """
    answer, ans, ans., option, choice, letter, solution
    reponse, choix, lettre
    respuesta, opcion, letra, resposta, opcao, alternativa, risposta, opzione
    antwort, losung, buchstabe, antwoord, svar, svaret
    vastaus, valasz, odpowiedz, odpowiedz to, odpoved, raspuns, raspunsul, cevap, jawaban, dap an
    đap an, jibu
    ответ, буква, вариант, відповідь, απαντηση
    答案, 答え, 回答, 正解, 正确选项, 正確選項, 选项, 選項, 정답, 답
    الإجابة, الاجابة, الجواب, جواب, پاسخ, התשובה, תשובה, उत्तर, উত্তর, คำตอบ, ตอบ
    """
)
_IS = _either(
    """
    is, was, are, be, being, would be, should be, must be, will be, seems to be, appears to be
    most likely, likely, probably, definitely, clearly, certainly, simply, therefore, thus, indeed
    actually, correct, the, number, no., option, choice, letter
    est, serait, la, la lettre, reponse, lettre, choix, correcte
    es, seria, sera, letra, la letra, opcion, opcao, opzione, correcta, correta
    ist, ware, lautet, buchstabe, ar, er, on, jest, je, adalah, yang benar, la, đung, это
    corretta, corretto, corecta, corect, juste, este, ειναι
    هي, هو, الصحيحة, है, היא, הוא, הנכונה, คือ
    """
)
_SIGN = _either(
    """
    :, =, >, →, -, –, —
    是, 为, 為, 应, 应该, 选, 選, 选项, 選項, は, 的, 은, 는
    """
)
_CHOOSING = _either(
    """
    it's, it is, that's, that is, that would be, i think, i believe, i guess, i say, i choose
    i pick, i select, i go with, i'd go with, i would go with, i'd say, i would say, i'd choose
    i would choose, i'd pick, i chose, i picked, i selected, i vote for, i answer, i think it's
    i think it is, i believe it's, i believe it is, i think that it's, i guess it's
    choose, pick, select, going with, go with, so, therefore, thus, hence
    must be, has to be, definitely, probably, certainly, the right one is, the correct one is
    leaving, leaving only, lean towards, lean toward, leaning towards, leaning toward
    c'est, c'est la, ce serait, je choisis, donc, es ist, das ist, richtig ist, ich wahle, also
    es la, elijo, escolho, scelgo, quindi, logo, entonces, portanto
    选, 選, 选择, 選擇, 因此
    """
)
_QUESTIONED = _either(
    "wrong, incorrect, false, not, n't, never, doubt, doubtful, unlikely, "
    "mauvaise, falsche, incorrecta, 错误, 錯誤"
)
_DENYING = _either(
    """
    not, n't, never, neither, nor, cannot be, rather than, instead of, except, except for, unlike
    eliminate, eliminates, eliminated, eliminating, rule out, rules out, ruled out, ruling out
    exclude, excludes, excluded, excluding, discard, discards, discarded, reject, rejects, rejected
    over, wrong, incorrect, false
    pas, nicht, kein, keine, no es, nao e, non e, не, 不是, 不选, 不選, 非
    """
)
_BETWEEN = _either(
    """
    be, is, option, choice, answer, answers, options, likely, simply, just, necessarily, the
    correct, right, la, le, die
    """
)
_IS_NOT = _either(
    """
    isn't, aren't, wasn't, doesn't, don't, can't, won't, cannot, does not, do not, did not, n'est
    """
)
_WRONG = _either(
    """
    not, wrong, incorrect, false, out, ruled, eliminated, excluded, invalid, irrelevant
    pas, faux, falsch, falso, incorrecta
    """
)
_RIGHT = _either(
    """
    correct, right, best, true, answer, appropriate, accurate
    bonne, correcte, correcta, correta, richtig
    """
)
_BE = _either("is, are, was, seems, looks, can be, could be, would be, est, ist, es, e")
_BUT_WORD = _either("but, it's, it is, mais, sondern, sino, rather, c'est")
_OR = _either("or, and, ou, oder, y, o, e, et, und")

# "is" of one letter, before a capital: "la risposta e B", "a resposta e a B".
_SHORT_IS = r"(?-i:e|e a|\u03b7)(?-i:(?= (?:[a-z]{1,2} )?[A-Z]\b))"
_NAMED = r"\s*[(\[{<'\"\u300c\u300e\u3010]*\s*([A-Za-z])"
_CUE = re.compile(
    rf"(?:(?<![a-z])|(?<=[{_WIDE}]))(?:{_ANSWER}['\")\]\u3011]*(?:\s*(?:{_SIGN}|(?:{_IS}|{_SHORT_IS})(?!\w)),?)*"
    rf"|{_CHOOSING}\s*[,:]?\s*(?:the\s+)?(?:{_ANSWER}\s*)?){_NAMED}(?:{_AFTER}|(?=[{_WIDE}]))",
    re.I,
)
_AFFIRMED = re.compile(
    r"(?:^|[.,:;!?(\n]|\b(?:option|choice|answer|letter|that|so|think|but|hence|therefore))\s*"
    rf"{_BEFORE}([A-Z])\)?\s+{_BE}\s+(?:(?:the|la|le|el|die|most|clearly|definitely)\s+)*"
    rf"{_RIGHT}(?!\w)",
    re.I,
)
_BUT = re.compile(
    rf"(?:\bnot|n't|\bpas|\bnicht|\bno)\s+[^.\n]{{0,20}}?[A-Za-z]\W{{1,4}}{_BUT_WORD}\s+"
    rf"(?:{_BUT_WORD}\s+|{_ANSWER}\s+)*{_NAMED}{_AFTER}",
    re.I,
)
_BRACKETED = re.compile(r"(?<!\w)[(\[{]([A-Za-z])[)\]}](?!\w)")
_LAST = re.compile(
    r"(?:[:,;\u2192>.!?|\n]|\s[-\u2013\u2014]\s)\s*['\"(\[]*([A-Z])['\")\].!]*[\s|]{0,20}\Z"
)
# What follows a letter without a space: "B is" in Japanese and Korean.
_PARTICLE = r"(?=\u304c|\u3067\u3059|\u3060|\uc785\ub2c8\ub2e4|\uc774\ub2e4|\uac00 )"
_FIRST = re.compile(rf"[\W_]*(?:\d{{1,2}}[.)]\s+)?[\W_]*([A-Za-z])(?:{_AFTER}|{_PARTICLE})")
_ALONE = re.compile(r"^[^\w\n]*([A-Z])[^\w\n]*$|\|[^\w\n|]*([A-Z])[^\w\n|]*(?=\|)", re.MULTILINE)
# A correction of an answer before it.
_CORRECTED = re.compile(
    r"\b(?:wait|actually|no|correction|scratch that|i mean|sorry|rather)\b[,.:!\s]*"
    rf"(?:(?:no|wait|actually|it's|it is|i mean)\b[,.:!\s]*){{0,3}}{_NAMED}"
    r"(?=[)\]'\"]*\s*(?:[.,!;]|\Z|\n))",
    re.I,
)
_LISTED = re.compile(r"^[\W_]*([A-Z])[).:]\s", re.MULTILINE)

# Before a letter, before a cue, and after a letter.
_DENIED_BEFORE = re.compile(
    rf"(?:(?<!\w)|(?=n't)|(?<=[{_WIDE}])){_DENYING}(?:\s+{_BETWEEN})*\s*:?\s*[(\[{{'\"]*$", re.I
)
_DENIED_CUE = re.compile(rf"{_QUESTIONED}[^\w.!?;\n]*(?:\w+[^\w.!?;\n]+){{0,2}}$", re.I)
_DENIED_AFTER = re.compile(
    rf"[)\]}}'\".]*\s*(?:{_BE}\s+(?:\w+ly\s+)?{_WRONG}(?!\w)|{_IS_NOT}(?!\w)|不"
    r"|\s*(?:\u3067\u306f|\u3058\u3083)(?:\u306a|\u3042)|\s*(?:\uac00|\uc774|\ub294|\uc740)?\s*\uc544[\ub2c8\ub2cc\ub2d9])",
    re.I,
)
_JOINED = re.compile(
    rf"[)\]}}'\".]*\s*(?:[,/;&、和或]|\b{_OR}\b)\s*"
    rf"(?:(?:or|and|either|option|choice|possibly|maybe|also)\s+)*[(\[{{'\"]*([A-Z]){_AFTER}"
)
# What may follow the letter A or I in a sentence about it; before any other word it is the article
# or the pronoun.
_ABOUT_IT = re.compile(
    r"[)\]}'\"]*(?:\s*\Z|\s*[^\w\s]|\s*\n|\s+"
    + _either(
        """
        is, was, are, because, since, as, and, or, but, not, which, due, for, with, by, from, given
        when, if, so, it, that, this, has, would, could, should, will, seems, represents, describes
        matches, fits, states, says, refers, rather, over, instead, here, in
        et, ou, est, car, parce, ist, weil, oder, und, es, porque, y
        """
    )
    + r"\b)"
)


def letters_of(prompt: str) -> frozenset[str]:
    """The letters of an item's options, from the last list A, B, ... in its prompt.

    All letters where the prompt has no such list.
    """
    last: list[str] = []
    for found in _OPTIONS.finditer(plain(prompt)):
        letter = (found[1] or found[2]).upper()
        if letter == "A":
            last = ["A"]
        elif last and ord(letter) == ord(last[-1]) + 1:
            last.append(letter)
    return frozenset(last) if len(last) > 1 else frozenset(map(chr, range(65, 91)))


def reference_letter(answer: str, prompt: str, where: str) -> str:
    """The letter of a reference answer. Raises EvaluationError where it is no letter of the item;
    `where` names the row in the message.
    """
    found = _REFERENCE.fullmatch(plain(answer))
    letters = letters_of(prompt)
    if found is None or not answer.strip():
        raise EvaluationError(
            f"{where}: its `answer` is not one letter, which the scorer choice compares with. "
            'Write the letter of the right option, such as "B"'
        )
    if found[1].upper() not in letters:
        raise EvaluationError(
            f"{where}: its `answer` is the letter {found[1].upper()}, and its options are "
            f"{', '.join(sorted(letters))}. Correct the answer or the options"
        )
    return found[1].upper()


def chosen_letter(completion: str, prompt: str) -> str | None:
    """The letter that a completion gives as its answer; None where that is not clear."""
    letters = letters_of(prompt)
    text = before_next_item(plain(completion))
    boxed = {found.upper() for found in _BOXED.findall(text)} & letters
    text = _LATEX.sub(lambda found: found[1] or found[2] or found[3] or "", text)
    text = without_accents(without_emphasis(text))
    if _BOXED.search(plain(completion)):
        return boxed.pop() if len(boxed) == 1 else None
    found: set[str] = set()
    for pattern in (_CUE, _AFFIRMED, _BUT, _CORRECTED):
        for match in pattern.finditer(text):
            found |= _named(text, match, letters, pattern is _CUE)
    found |= _first(text, letters)
    if not found:
        for pattern in (_BRACKETED, _LAST):
            for match in pattern.finditer(text):
                if pattern is _BRACKETED or not _listed(text, match):
                    found |= _named(text, match, letters, False)
    return found.pop() if len(found) == 1 else None


def _named(text: str, match: re.Match[str], letters: frozenset[str], cue: bool) -> set[str]:
    """The item's letters that a match names: none if it is denied, several if it names several."""
    letter, end = match[1], match.end(1)
    if not _is_letter(text, match.start(1), end) or letter.upper() not in letters:
        return set()
    if cue and (
        _DENIED_CUE.search(_before(text, match.start()))
        or text[end:].lstrip(" )'\"").startswith("?")
    ):
        return set()
    if _DENIED_BEFORE.search(_before(text, match.start(1))) or _DENIED_AFTER.match(text, end):
        return set()
    return {letter.upper(), *_joined(text, end)} & letters


def _before(text: str, end: int) -> str:
    """The words before a place that may deny what follows."""
    return text[max(0, end - 100) : end]


def _joined(text: str, end: int) -> set[str]:
    """The letters that follow one after a comma or "or": "B or C"."""
    found = set()
    while (match := _JOINED.match(text, end)) and _is_letter(text, match.start(1), match.end(1)):
        if _DENIED_AFTER.match(text, match.end(1)):
            break
        found.add(match[1])
        end = match.end(1)
    return found


def _is_letter(text: str, start: int, end: int) -> bool:
    """Whether a single letter stands for an option, rather than being an article or a pronoun."""
    letter = text[start:end]
    bracketed = text[end : end + 1] in (")", "]", "}")
    if bracketed:
        return True
    if letter == "I" and re.match(r"\s+(?:would|could|should|will|was|has)\b", text[end:]):
        return False
    if letter.islower():
        return re.fullmatch(r"['\")\].:!\s]*", text[end:]) is not None or text[end : end + 1] == "'"
    return letter not in "AIEOUY" or _ABOUT_IT.match(text, end) is not None


def _several_alone(text: str) -> bool:
    """Whether several letters have a line or a table's cell of their own."""
    return len({found[1] or found[2] for found in _ALONE.finditer(text)}) > 1


def _listed(text: str, match: re.Match[str]) -> bool:
    """Whether the last letter of a text ends a list of letters: "none of A, B, C"."""
    before = re.sub(r"(?i)\bnot\s+\W*[a-z]\W*,", "", text[: match.start(1)])
    return _several_alone(text) or re.search(r"\b[A-Za-z]['\")\]]*\s*[,;]\W*$", before) is not None


def _first(text: str, letters: frozenset[str]) -> set[str]:
    """The letter that begins a completion, unless the completion repeats the list of options."""
    match = _FIRST.match(text)
    if match is None or len(set(_LISTED.findall(text))) > 1 or _several_alone(text):
        return set()
    after = text[match.end(1) :]
    if re.match(r"\s*\?\s*\S", after):
        return set()
    # A letter and a word is an initial or a name: "B Franklin", "C programming".
    if re.match(r"\s+[^\W\d_]", after) and not _ABOUT_IT.match(text, match.end(1)):
        return set()
    return _named(text, match, letters, False)
