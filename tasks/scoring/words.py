"""The words of a text in any script.

A word is a run of letters, digits and combining marks. Some scripts put no space between words:
Chinese, Japanese kana, Thai, Lao, Khmer, Burmese, Tibetan, and some more. Their words cannot be
found without a dictionary, so there a word is one character with its combining marks. Every other
character, an underscore too, separates words. For ASCII text these are the words of Google's
rouge-score.
"""

import unicodedata

# First and last code point of the scripts that are written without spaces between words.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark and zero
    (0x3021, 0x30FF),  # Hangzhou numerals, hiragana, katakana
    (0x3100, 0x312F),  # Bopomofo
    (0x31A0, 0x31FF),  # Bopomofo and katakana, extended
    (0x3400, 0x9FFF),  # ideographs
    (0xA980, 0xA9DF),  # Javanese
    (0xAA60, 0xAADF),  # Burmese, extended; Tai Viet
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0x1B000, 0x1B16F),  # kana, extended
    (0x20000, 0x3FFFF),  # ideographs, extended
)
# Vowel signs that Arabic and Hebrew leave out in ordinary writing, and the Arabic lengthening mark.
_OPTIONAL = frozenset(
    [*range(0x0591, 0x05C8), *range(0x0610, 0x061B), 0x0640, *range(0x064B, 0x0653), 0x0670]
)


def unspaced(character: str) -> bool:
    """Whether the character belongs to a script without spaces between words."""
    code = ord(character)
    return code >= _UNSPACED[0][0] and any(first <= code <= last for first, last in _UNSPACED)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case and compatibility form (NFKC).

    Characters without width are left out: they join what is on both sides, as a reader sees it.
    """
    words: list[str] = []
    within = False  # whether the next letter continues the last word
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)
        if kind == "Cf" or ord(character) in _OPTIONAL:
            continue
        if kind[0] == "M":
            if words and within:
                words[-1] += character
            continue
        if kind[0] not in "LN":
            within = False
        elif unspaced(character):
            words.append(character)
            within = True
        elif within and not unspaced(words[-1][0]):
            words[-1] += character
        else:
            words.append(character)
            within = True
    return words
