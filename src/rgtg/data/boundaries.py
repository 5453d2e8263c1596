"""Whether a prompt and its completion run together, as "What is it?" and "A cat." do, without a space between them."""

import unicodedata
from functools import cache

# Scripts that put no spaces between words, by the first word of their characters' names.
_WITHOUT_SPACES = {
    "CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "IDEOGRAPHIC", "HENTAIGANA", "YI", "THAI", "LAO", "KHMER", "MYANMAR",
    "TIBETAN", "TAI", "NEW", "JAVANESE", "BALINESE",
}  # fmt: skip
# Marks after which a space follows; after brackets, quotes, slashes and the like it need not.
_BEFORE_SPACE = ".,;:!?…"


def run_together(prompt: str, completion: str) -> bool:
    """Whether a space is missing between a prompt and its completion, which are joined as they are.

    True where a letter, a digit or one of ``. , ; : ! ? …`` meets a letter or a digit. Not in scripts without spaces
    between words, such as Chinese, Japanese and Thai.

    >>> run_together("What is it?", "A cat."), run_together("What is it?", " A cat."), run_together("这是什么?", "猫")
    (True, False, False)
    """
    if not prompt or not completion:
        return False
    last, first = prompt[-1], completion[0]
    if not first.isalnum() or not (last.isalnum() or last in _BEFORE_SPACE):
        return False
    letter = next((char for char in reversed(prompt[-200:]) if char.isalpha()), last)
    return not any(map(_without_spaces, (last, first, letter)))


@cache
def _without_spaces(char: str) -> bool:
    name = unicodedata.name(unicodedata.normalize("NFKC", char)[0], "")
    return name.split(" ")[0].split("-")[0] in _WITHOUT_SPACES
