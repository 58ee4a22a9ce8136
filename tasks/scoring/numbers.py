"""The number that answers an item.

Invariant: a completion is right, wrong, or undecided. Numbers are compared exactly, as fractions.
A number that may be read in two ways (1,234 is 1234 or 1.234) is undecided where only the less
usual reading is right. So is a number in another unit than the reference.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from ebbline.tasks.errors import EvaluationError
from ebbline.tasks.scoring.text import plain, without_emphasis

_GROUPED = r"\d{1,3}(?:[,.' ]\d{2,3})*[,.' ]\d{3}(?!\d)(?:[,.]\d+)?"
_DIGITS = rf"(?:{_GROUPED}|\d+(?:[,.]\d+)?|\.\d+)"
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+]\s?)?(?P<currency>[$\u20ac\u00a3\u00a5\u20b9]\s?)?"
    rf"(?P<sign2>(?<=[$\u20ac\u00a3\u00a5\u20b9])[-+])?(?<![\w.,^])"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s?[/\u2044]))?(?P<value>{_DIGITS})"
    rf"(?:\s?[/\u2044]\s?(?P<under>\d+(?:\.\d+)?)(?![/\d]))?"
    r"(?:[eE](?P<e>[-+]?\d{1,3})(?!\w)|\s?(?:x|\*|\u00d7|\\times)\s?10\s?\^?\s?\{?(?P<ten>[-+]?\d{1,3})\}?)?"
    r"(?P<percent>\s?\\?%|\s+percent\b)?(?:\s?(?P<unit>[^\W\d_]+\b(?:\^?\d)?))?"
)
_LONGEST = 200  # characters
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
            "thousand",
            "million",
            "billion",
            "cents cent",
            "dollars dollar",
        )
    )
    for unit in units.split()
}


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
    found, reference = _answered(completion), _reference(answer)
    if not found or len(reference) != 1:
        return None
    given, right = found[-1], reference[0]
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


def _answered(completion: str) -> list[_Number]:
    """The numbers of the part of a completion that answers, the answer last."""
    text = _prepared(completion)
    if "####" in text:
        return _numbers(text.rpartition("####")[2].strip().partition("\n")[0])[:1]
    if boxed := _boxed(text):
        return _numbers(boxed)
    cues = [found.end() for found in _ANSWER.finditer(text)]
    return _numbers(text[cues[-1] :])[:1] if cues else _numbers(text)


def _boxed(text: str) -> str:
    found = _BOXED.findall(text)
    return found[-1] if found else ""


def _prepared(text: str) -> str:
    marked = re.sub(r"####", "\x00", text)
    found = _FRACTION.sub(r"\1\2/\3", plain(marked))
    return _LATEX.sub(
        lambda each: each[1] or "", without_emphasis(re.sub(r"(?<=\d)\s?\*\s?(?=\d)", "x", found))
    ).replace("\x00", "####")


def _numbers(text: str) -> list[_Number]:
    """The numbers of a text; none if one is too long to be an answer, such as a loop of digits."""
    matches = list(_NUMBER.finditer(text))
    if any(len(found[0]) > _LONGEST for found in matches):
        return []
    return [number for found in matches if (number := _parsed(found)) is not None]


def _parsed(found: re.Match[str]) -> _Number | None:
    usual, other = _readings(found["value"])
    under = Fraction(found["under"]) if found["under"] else Fraction(1)
    if under == 0:
        return None
    power = int(found["e"] or found["ten"] or 0)
    whole = Fraction(found["whole"] or 0)
    negative = "-" in (found["sign"] or "") + (found["sign2"] or "")

    def scaled(value: Fraction) -> Fraction:
        return (whole + value / under) * Fraction(10) ** power * (-1 if negative else 1)

    decimals = re.search(r"[.,](\d+)$", found["value"])
    return _Number(
        scaled(usual),
        None if other is None else scaled(other),
        found["percent"] is not None,
        _UNITS.get((found["unit"] or "").lower()),
        len(decimals[1]) if decimals else 0,
    )


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
