"""The bytes that token ids stand for: to find text across tokens, and to show tokens that only together are text."""

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ma_sft.errors import ResponseTemplateError
from ma_sft.labels.templates import control_tokens


class TokenBytes(dict[int, bytes]):
    """Id -> the bytes that the token stands for; a control token is a symbol that is no UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = {index: text for text, index in control_tokens(tokenizer).items()}
        super().__init__({i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()})
        self.update({i: b"\xff%d\xfe" % i for i in self.control})
        decoder = str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
        # The printable character in which byte-level tokenizers write each byte
        self._alphabet = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in decoder else {}
        self._sentencepiece = "▁" in decoder or "Metaspace" in decoder

    def __missing__(self, index: int) -> bytes:
        token = self.tokenizer.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            raise ResponseTemplateError(f"token id {index} is not in the tokenizer's vocabulary")
        if self._alphabet:
            self[index] = bytes(self._alphabet[char] for char in token)
        elif self._sentencepiece:
            byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
            self[index] = bytes.fromhex(byte.group(1)) if byte else token.replace("▁", " ").encode()
        else:
            self[index] = str(self.tokenizer.decode([index])).encode()
        return self[index]

    def readable(self, raw: bytes) -> str:
        """Text of joined token bytes, with control tokens as they are written."""
        parts = re.split(rb"\xff(\d+)\xfe", raw)
        return "".join(
            part.decode(errors="replace") if at % 2 == 0 else self.control[int(part)] for at, part in enumerate(parts)
        )
