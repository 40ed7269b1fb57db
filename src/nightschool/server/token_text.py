"""What single tokens look like: their text and their exact bytes, half characters too."""

from __future__ import annotations

from typing import Any

from nightschool.engine.detokenize import byte_of_letter


class TokenText:
    """Describes the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        """The text of a token; where it is half a character, its bytes in hexadecimal, as OpenAI writes them."""
        raw = self._bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def described(self, token_id: int, logprob: float) -> dict[str, Any]:
        """`{"token", "logprob", "bytes"}`."""
        return {"token": self.text(token_id), "logprob": logprob, "bytes": list(self._bytes(token_id))}

    def _bytes(self, token_id: int) -> bytes:
        text = str(self._tokenizer.decode([token_id]))
        if "\ufffd" not in text:
            return text.encode()
        # Half a character: byte-level vocabularies spell every byte as one printable character.
        spelled = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if spelled.startswith("<0x") and spelled.endswith(">") and len(spelled) == 6:
            return bytes([int(spelled[3:5], 16)])
        table = byte_of_letter()
        return bytes(table[c] for c in spelled) if all(c in table for c in spelled) else text.encode()
