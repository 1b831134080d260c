"""Texts -> ids, many at a time: by `fastokens` where it is installed and gives the same ids, else by `tokenizers`.

A faster tokenizer is only another way to the same ids. It is built from the same `tokenizer.json`, must agree on texts
that tokenizers are known to differ in, and then on an even sample of the rows at hand; else it is left.
"""

import os
from array import array
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

FAST, STANDARD = "fastokens", "tokenizers"
EVERY = 1000  # of so many texts of a batch, one is encoded by both
# Spaces, line ends, digits, joined and composed characters, scripts, bytes, markup that is no control token.
HARD = (
    *("", " ", "  a  b\n\n\n c\t\td \r\n", "a" * 1000, "1234567890 3.14 1,000", "don't I'LL we've"),
    *("é e\u0301 ﬁ Ǆ ß İ", "👩\u200d👩\u200d👧 🇩🇪 𠮷 \u200b\u200d\ufeff\u00a0\u2028"),
    *("中文，标点。日本語 한국어 العربية हिन्दी ไทย", "\x00\x01\x7f\x80"),
    *("<think>\n\n</think> <|x|> </s> [INST]", "def f(x):\n    return x  # ~~\n"),
    *("https://a.b/c?d=e&f=%20#g", "▁ Ġ ĊĊ <0x0A>"),
)


class DifferentResultError(Exception):
    """A faster engine gave another result for a row than the standard one."""


class Backend:
    """Encodes texts without adding special tokens; `backend(texts)` gives of each the ids as the bytes of int32s.

    Args:
        tokenizer: a fast tokenizer, whose truncation and padding are left out.
        fast: take the faster tokenizer if it may be.
        from_characters: of this process' texts, from which on building it takes less time than it saves.

    Attributes:
        wanted: the package that would encode, with its version.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, fast: bool = True, from_characters: int = 1_000_000
    ) -> None:
        self.tokenizer, self.from_characters, self._characters = tokenizer, from_characters, 0
        package = FAST if fast and find_spec(FAST) is not None else STANDARD
        self.wanted = f"{package} {version(package)}"
        self._fast: Any = None
        self._maker: int | None = None  # the process that built it: another builds its own

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text.

        Raises:
            DifferentResultError: the faster tokenizer differs from the standard one on one of `EVERY` texts.
        """
        if self._maker != os.getpid():
            self._characters += sum(map(len, texts))
            if self._characters < self.from_characters:
                return self.standard(texts)
            self._maker, self._fast = os.getpid(), self._make()
        return self._encode(self._fast, texts) if self._fast else self.standard(texts)

    def _make(self) -> Any:
        """The faster tokenizer, which takes up to a second, if it gives the same ids of hard texts."""
        if self.wanted.startswith(STANDARD):
            return None
        from fastokens import Tokenizer

        try:
            fast = Tokenizer.from_json_str(self.tokenizer.backend_tokenizer.to_str())
            self._encode(fast, HARD, every=1)
        except (ValueError, DifferentResultError):
            return None
        return fast

    def _encode(self, fast: Any, texts: Sequence[str], every: int = EVERY) -> list[bytes]:
        ids, offsets = fast.encode_batch_flat(list(texts))
        found = [bytes(ids[4 * start : 4 * end]) for start, end in pairwise(memoryview(offsets).cast("Q"))]
        some = texts[::every]
        for text, ids_of_text, standard in zip(some, found[::every], self.standard(some), strict=True):
            if ids_of_text != standard:
                raise DifferentResultError(f"{FAST} gives other ids than {STANDARD} for {text[:80]!r}")
        return found

    def standard(self, texts: Sequence[str]) -> list[bytes]:
        """The same by `tokenizers`."""
        self.tokenizer("")  # leaves the backend without padding, truncation or split special tokens
        encoded = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [array("i", encoding.ids).tobytes() for encoding in encoded]

    def __getstate__(self) -> dict[str, Any]:
        """Another process builds its own."""
        return {**self.__dict__, "_fast": None, "_maker": None}
