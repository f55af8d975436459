"""Text to tokens and back: sentencepiece, the instruct template, detokenisation that streams whole
characters."""

import re
from codecs import getincrementaldecoder
from pathlib import Path

import sentencepiece

from .config import MixtralConfig
from .errors import UserError

MARK = "\u2581"                             # sentencepiece's visible space
TEMPLATED = re.compile(r"\s*(?:<s>)?\s*\[INST\] ?((?:(?!\[/?INST\]).)*?) ?\[/INST\]\s*", re.S)


class Tokenizer:
    """A `tokenizer.model`. `encode` puts BOS in front; text is never parsed for control tokens.

    `UserError` if text may become ids that the model does not have (one that has more is merely padded).
    """

    def __init__(self, path: Path, config: MixtralConfig):
        if not path.exists():
            raise UserError(f"{path}: no such file; copy the model's sentencepiece file there")
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:          # sentencepiece raises bare RuntimeErrors, some over several lines
            raise UserError(f"{path}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
        if (pieces := self.sp.vocab_size()) > config.vocab_size:
            raise UserError(f"{path}: has {pieces} pieces, more than the model's vocab_size "
                            f"{config.vocab_size}: it is another model's; get the one that belongs to this")
        self.bos, self.eos = config.bos_token_id, config.eos_token_ids      # (the first ends an answer)

    def encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the prompt is not text: it holds bytes that are not UTF-8") from None
        return [self.bos, *self.sp.encode(text)]

    def chat(self, message: str, before: list[int] | tuple = ()) -> list[int]:
        """A user's message in the instruct models' template, after the conversation `before` it; closes its
        answer.

        As mistral-common defines it: tokenizers with control tokens for it (v3: Mixtral-8x22B-Instruct) read
        `<s>[INST] hello[/INST] answer</s>[INST] ..`; those without (v1: Mixtral-8x7B-Instruct) `[INST] hello
        [/INST]`, as text. A message that stands in the template already is taken out of it; `UserError` for
        several of them.
        """
        message = match[1] if (match := TEMPLATED.fullmatch(message)) else message
        if message.lstrip().startswith(("<s>", "[INST]")):
            raise UserError("the message is in the [INST] template already, and --chat adds it: "
                            "give the bare message")
        if not message.strip():
            raise UserError("the message is empty; give some text")
        begin, end = map(self.sp.piece_to_id, ("[INST]", "[/INST]"))
        if self.sp.is_control(begin) and self.sp.is_control(end):
            turn = [begin, *self.encode(message)[1:], end]
        else:
            turn = self.encode(f"[INST] {message} [/INST]")[1:]
        return [*before, *self.eos[:1], *turn] if before else [self.bos, *turn]

    def decode(self, ids: list[int]) -> str:
        """New tokens as the text that follows a prompt: a leading space is kept."""
        stream = TextStream(self)
        return "".join(map(stream.push, ids)) + stream.close()


class TextStream:
    """Tokens in, pieces of text out, as soon as they are certain.

    Byte tokens (<0x..>) are held until they make a whole UTF-8 character; bytes that never will become
    U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.sp, self.characters = tokenizer.sp, getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if not 0 <= token < self.sp.vocab_size() or self.sp.is_control(token):
            return ""                       # a model's vocabulary may be padded beyond its tokenizer's
        piece = self.sp.id_to_piece(token)
        if self.sp.is_byte(token):
            return self.characters.decode(bytes([int(piece[1:-1], 16)]))
        return self.close() + ("\ufffd" if self.sp.is_unknown(token) else piece.replace(MARK, " "))

    def close(self) -> str:
        """What was held back, for better or worse."""
        return self.characters.decode(b"", final=True)
