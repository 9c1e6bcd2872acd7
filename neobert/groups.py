"""Texts in groups for the encoder, each checked as it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# A group starts small, so that computing starts early, and doubles to a size at which the partly
# filled last batch no longer counts. In batches of max_tokens, at 4 characters a token.
FIRST_GROUP, LARGEST_GROUP = 4, 64
CHARACTERS_PER_TOKEN = 4
MOST_CHARACTERS = 1 << 26  # in a group, whatever their number of tokens: bounds the memory


def check_text(text: object, index: int) -> None:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] must be a str, got {type(text).__name__}: {text!r:.80}")


def check_unicode(text: str, index: int, cause: Exception) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"texts[{index}] is not valid Unicode: {error}") from cause


def in_groups(
    texts: Iterable[str], max_tokens: int, max_length: int, prompt_length: int
) -> Iterator[tuple[list[str], int, bool]]:
    """Texts in groups that grow from FIRST_GROUP to LARGEST_GROUP batches, where each starts, and
    whether it is known to be the last.

    Counted in characters, for tokens are not known yet; characters beyond max_length tokens do
    not count, nor can a text count as fewer than its special tokens.
    """
    batch = max_tokens * CHARACTERS_PER_TOKEN
    most = max_length * CHARACTERS_PER_TOKEN
    size = FIRST_GROUP * batch
    group: list[str] = []
    start = characters = held = 0
    for index, text in enumerate(texts):
        check_text(text, index)
        group.append(text)
        characters += min(prompt_length + len(text) + 2 * CHARACTERS_PER_TOKEN, most)
        held += len(text)
        if characters >= size or held >= MOST_CHARACTERS:
            yield group, start, False
            group, start, characters, held = [], index + 1, 0, 0
            size = min(2 * size, LARGEST_GROUP * batch)
    if group:
        yield group, start, True
