"""The number that answers an item.

Invariant: a completion is right, wrong, or undecided. Numbers are compared exactly, as fractions.
A number that may be read in two ways (1,234 is 1234 or 1.234) is undecided where only the less
usual reading is right. So is a number in another unit than the reference,
and a part of a calculation, a range or a date. Denied numbers ("not 12") are left out.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.scoring.text import before_next_item, plain, without_accents, without_emphasis

_GROUPED = r"\d{1,3}(?:[,.' ]\d{2,3})*[,.' ]\d{3}(?!\d)(?:[,.]\d+)?"
_DIGITS = rf"(?:{_GROUPED}|\d+(?:[,.]\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+]\s?)?(?P<currency>[$\u20ac\u00a3\u00a5\u20b9]\s?)?"
    rf"(?P<sign2>(?<=[$\u20ac\u00a3\u00a5\u20b9])[-+])?(?<![\w.,^])"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?[/\u2044]))?(?P<value>{_DIGITS})"
    rf"(?:\s?[/\u2044]\s?(?P<under>\d+(?:\.\d+)?)(?![/\d]))?"
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?!\w)|\s?(?:x|\*|\u00d7|\\times)\s?10\s?\^?\s?\{?(?P<ten>[-+]?\d{1,3})\}?"
    r"|\s?\^\s?\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"(?P<percent>\s?\\?%|\s+(?:percent|per ?cento?|prozent|procent|pour cent"
    r"|por ciento|por cento)\b)?(?:\s?(?P<unit>[^\W\d_]+\b(?:\^?\d)?))?"
)
_MOST_POWER = 99
_LONGEST = 200  # characters
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)(?!\d)")
_FRACTION = re.compile(r"(-?)\s*\\d?t?frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\[,;! ]|(?<!\d)\$|\$(?!\s?\d)"
)
_ANSWER = re.compile(
    r"(?:answer|result|total|reponse|r\u00e9ponse|respuesta|antwort|\u7b54\u6848|\u7b54\u3048|\u041e\u0442\u0432\u0435\u0442)"
    r"(?:\s+(?:is|est|es|ist|of|equals|therefore|thus))*\s*(?:[:=\u662f\u4e3a\u306f]\s*)?[^\w.\n]{0,4}?(?=[-+$\u20ac\u00a3.\d])",
    re.I,
)
_UNITS = {
    unit: kind
    for kind, units in enumerate(
        (
            "km kilometers kilometres kilometer kilometre",
            "m meters metres meter metre",
            "cm centimeters centimetres",
            "mm millimeters millimetres",
            "kg kilograms kilogram",
            "g grams gram",
            "mg milligrams",
            "l liters litres liter litre",
            "ml milliliters millilitres",
            "s sec seconds second",
            "min mins minutes minute",
            "h hr hrs hours hour",
            "days day",
            "weeks week",
            "months month",
            "years year",
            "miles mile",
            "feet foot ft",
            "inches inch",
            "cents cent",
            "dollars dollar",
        )
    )
    for unit in units.split()
}

# Words and letters that multiply the number before them.
_SCALES = {
    word: Fraction(10) ** power
    for power, words in (
        (3, "thousand thousands tausend mille mil тысяч тысячи тысяча 千"),
        (4, "万 萬"),
        (6, "million millions millionen millon millones milhao milhoes milione milioni mio"),
        (6, "миллион миллиона миллионов"),
        (8, "亿 億"),
        (9, "billion billions milliard milliards milliarde milliarden miliardo miliardi"),
    )
    for word in words.split()
}
_ATTACHED_SCALES = {"k": 3, "K": 3, "M": 6, "mn": 6, "bn": 9}

# Between two numbers of one calculation, range, ratio, time or date; and before its result.
_OPERATOR = re.compile(
    r"[^\S\n]*[)\]]*[^\S\n]*(?:[-+*x/\u00d7\u00f7\u2013]|plus|minus|times|divided by|multiplied by)"
    r"[^\S\n]*[(\[$\u20ac\u00a3\u00a5\u20b9]*[^\S\n]*-?|:"
)
_NO_UNITS = set("x plus minus times divided multiplied and is equals makes gives".split())
_AND = re.compile(r"\s*,?\s*(?:and|,)\s*")
_EQUALS = re.compile(
    r"[^\S\n]*[)\]]*[^\S\n]*(?:=|(?:is|equals|makes|gives)\b)[^\S\n]*[$\u20ac\u00a3\u00a5\u20b9]?\s?[-+]?"
)
_DENIED = re.compile(r"(?:\bnot|n't|\bnicht|\bpas|\u4e0d\u662f)\s*(?:be\s+)?[^\w\s]{0,3}$", re.I)


@dataclass(frozen=True)
class _Number:
    """A number's usual reading, its other reading if it has one, its percent sign and its unit."""

    usual: Fraction
    other: Fraction | None
    percent: bool
    unit: int | None
    decimals: int


def reference_number(answer: str, where: str) -> None:
    """Raise EvaluationError for a reference that is not one number; `where` names its row."""
    count = len(_reference(answer))
    if count != 1:
        raise EvaluationError(
            f"{where}: its `answer` holds {count or 'no'} numbers, and the scorer number compares "
            "with one. Write that number, or put it after ####"
        )


def number(completion: str, answer: str) -> float | None:
    """1 when the number that a completion ends in, or marks as its answer, equals the reference; 0
    when it does not; None where there is none or it can be read in two ways.
    """
    given, reference = _answered(completion), _reference(answer)
    if given is None or len(reference) != 1:
        return None
    right = reference[0]
    if _equal(given, given.usual, right):
        if given.unit is not None and right.unit is not None and given.unit != right.unit:
            return None
        return 1.0
    readings = [reading for reading in (given.other,) if reading is not None]
    if any(_equal(given, reading, right) for reading in readings) or (
        right.other is not None and given.usual == right.other
    ):
        return None
    # A number without its percent sign, or in a share's place, may be meant either way.
    if given.percent != right.percent and given.usual == right.usual:
        return None
    return 0.0 if given.unit == right.unit or None in (given.unit, right.unit) else None


def _equal(given: _Number, value: Fraction, right: _Number) -> bool:
    if given.percent == right.percent:
        return value == right.usual or _rounded(value, given, right)
    share, hundred = (value, right.usual) if right.percent else (right.usual, value)
    # 50% is 0.5. A missing sign is forgiven where the number is no share: 50 for 50%.
    return share * 100 == hundred or (value == right.usual and abs(value) > 1)


def _rounded(value: Fraction, given: _Number, right: _Number) -> bool:
    """Whether a decimal is the reference rounded, where that has no finite decimals (1/3)."""
    denominator = right.usual.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return (
        denominator > 1
        and given.decimals >= 2
        and abs(value - right.usual) * 10**given.decimals * 2 <= 1
    )


def _reference(answer: str) -> list[_Number]:
    text = _prepared(answer)
    return _numbers(text.rpartition("####")[2] if "####" in text else _boxed(text) or text)


def _answered(completion: str) -> _Number | None:
    """The number that a completion gives as its answer."""
    text = _prepared(before_next_item(completion))
    if "####" in text:
        return _first(text.rpartition("####")[2].strip().partition("\n")[0])
    if boxed := _boxed(text):
        given = _first(boxed)
        return given if given is None or _last(boxed) == given else None
    cues = list(_ANSWER.finditer(text))
    if not cues:
        return _last(text)
    return _first(text[cues[-1].end() :], listed=bool(re.search(r"\bof\W*$", cues[-1][0])))


def _first(text: str, listed: bool = False) -> _Number | None:
    """The first number of a text; of a calculation, its result. `listed`: "3 and 5" is one too."""
    found = _matches(text)
    for index, match in enumerate(found):
        if not _joined(text, match, found[index + 1 : index + 2], listed):
            following = found[index + 1 : index + 2]
            if index and following and _EQUALS.fullmatch(_between(text, match, following[0])):
                return _parsed(following[0])
            return None if index else _parsed(match)
    return None


def _last(text: str) -> _Number | None:
    """The last number of a text, unless it is a part of a calculation."""
    found = _matches(text)
    if not found or (len(found) > 1 and _joined(text, found[-2], found[-1:])):
        return None
    return _parsed(found[-1])


def _joined(
    text: str, match: re.Match[str], following: list[re.Match[str]], listed: bool = False
) -> bool:
    """Whether a number and the following one are parts of one calculation, range or date."""
    if not following:
        return False
    between = _between(text, match, following[0])
    return bool(_OPERATOR.fullmatch(between) or (listed and _AND.fullmatch(between)))


def _between(text: str, match: re.Match[str], following: re.Match[str]) -> str:
    """The text between two numbers, without the unit of the first."""
    start = match.start("unit") if match["unit"] in _NO_UNITS else match.end()
    return text[start : following.start("whole" if following["whole"] else "value")]


def _boxed(text: str) -> str:
    found = _BOXED.findall(text)
    return found[-1] if found else ""


def _prepared(text: str) -> str:
    marked = re.sub(r"####", "\x00", text)
    marked = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", marked)  # 1½ is not 11/2
    marked = re.sub(r"(?<=\d)\*\*(?=\d)", "^", marked)
    marked = re.sub(r"(?<=\d)(?:\u066c|\{,\}|_(?=\d{3}))(?=\d)", ",", marked)
    marked = re.sub(r"(?<=\d)\u066b(?=\d)", ".", marked)
    marked = _SHORT_FRACTION.sub(r"\1/\2", marked)
    found = _FRACTION.sub(r"\1\2/\3", plain(marked))
    return _LATEX.sub(
        lambda each: each[1] or "",
        without_emphasis(re.sub(r"(?<=\d)\s?[*x\u00d7]\s?(?=\d)", " x ", found)),
    ).replace("\x00", "####")


def _numbers(text: str) -> list[_Number]:
    """The numbers of a text; none if one is too long to be an answer, such as a loop of digits."""
    return [number for found in _matches(text) if (number := _parsed(found)) is not None]


def _matches(text: str) -> list[re.Match[str]]:
    found = list(_NUMBER.finditer(text))
    if any(len(match[0]) > _LONGEST for match in found):
        return []
    return [
        match
        for match in found
        if not _DENIED.search(text[max(0, match.start() - 20) : match.start()])
    ]


def _parsed(found: re.Match[str]) -> _Number | None:
    usual, other = _readings(found["value"])
    under = Fraction(found["under"]) if found["under"] else Fraction(1)
    if under == 0:
        return None
    power, exponent = int(found["e"] or found["ten"] or 0), int(found["power"] or 1)
    if abs(exponent) > _MOST_POWER or (usual == 0 and exponent < 0):
        return None
    scale = _scale(found)
    whole = Fraction(found["whole"] or 0)
    negative = "-" in (found["sign"] or "") + (found["sign2"] or "")

    def scaled(value: Fraction) -> Fraction:
        size = (whole + value / under) ** exponent * Fraction(10) ** power
        return size * (-1 if negative else 1)

    decimals = re.search(r"[.,](\d+)$", found["value"])
    return _Number(
        scaled(usual) * scale,
        # "2 million" may answer "how many millions?".
        scaled(usual) if scale != 1 else None if other is None else scaled(other),
        found["percent"] is not None,
        _UNITS.get((found["unit"] or "").lower()),
        len(decimals[1]) if decimals else 0,
    )


def _scale(found: re.Match[str]) -> Fraction:
    """What the word after a number multiplies it by: 10^6 for "million"."""
    unit = found["unit"] or ""
    if unit and found[0].removesuffix(unit)[-1:].isdigit() and unit in _ATTACHED_SCALES:
        return Fraction(10) ** _ATTACHED_SCALES[unit]
    return _SCALES.get(without_accents(unit.lower()), _SCALES.get(unit[:1], Fraction(1)))


def _readings(digits: str) -> tuple[Fraction, Fraction | None]:
    """The usual (English) reading of digits with separators, and the other one where there is one.

    1,234.5 and 1.234,5 and 1'234.5 and 1 234,5 have one reading. 1,234 is 1234, or 1.234 in
    continental Europe; 1.234 is 1.234, or 1234 there.
    """
    marks = [each for each in digits if not each.isdigit()]
    bare = re.sub(r"\D", "", digits)
    if not marks:
        return Fraction(digits), None
    if marks == ["."] or marks == [","]:
        head, tail = re.split(r"[.,]", digits)
        decimal = Fraction(f"{head or 0}.{tail}")
        if len(tail) != 3 or not head or head.startswith("0") or len(head) > 3:
            return decimal, None
        return (decimal, Fraction(bare)) if marks == ["."] else (Fraction(bare), decimal)
    last = marks[-1]
    if last in ".," and last not in marks[:-1]:
        head, _, tail = digits.rpartition(last)
        return Fraction(f"{re.sub(r'[^0-9]', '', head)}.{tail}"), None
    return Fraction(bare), None
