"""Words of any script, for scores that count them.

rouge-score knows a to z and digits only: of Russian or Chinese it sees nothing, and gives the right answer 0.
sacrebleu takes a sentence without spaces as one word.
"""

import unicodedata

_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x9FFF),  # Chinese characters, as also in Japanese
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
"""Where Unicode has scripts that put no spaces between words: each character counts as a word."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; of ASCII the same ones as rouge-score has."""
    found, word = [], ""
    for character in unicodedata.normalize("NFC", text.lower()):
        belongs = character.isalnum() or unicodedata.category(character).startswith("M")
        if belongs and not is_unspaced(character):
            word += character
            continue
        found += [word, character if belongs else ""]
        word = ""
    return [word for word in (*found, word) if word]


def is_unspaced(text: str) -> bool:
    """Whether a text has characters of scripts that put no spaces between words."""
    return any(first <= ord(character) <= last for character in text for first, last in _UNSPACED)


def as_ascii(text: str) -> str:
    """Return the words of a text with spaces between, those that are no ASCII as their bytes: equal if they were."""
    return " ".join(word if word.isascii() else f"u{word.encode(errors='replace').hex()}" for word in words(text))
