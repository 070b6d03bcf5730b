"""Text to token ids and back, by the `tokenizers` library and the model's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from ..errors import InvalidRequest, ModelFormatError
from ..files import ModelFiles
from .chat import ChatTemplate
from .detokenizer import Detokenizer

_MAX_JSON_BYTES = 1 << 28


class Tokenizer:
    """A model's tokenizer and what its files say about special tokens. Safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_ids = tuple(eos_ids)
        """Ids that end an answer."""
        self.chat_template = chat_template
        self.vocab_size = backend.get_vocab_size()
        """Added tokens included."""
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(number for number, token in added.items() if token.special)
        self._byte_ids = _byte_ids(backend)
        self._anchor = backend.encode("a", add_special_tokens=False).ids
        self._anchor_text = self.decode(self._anchor)

    @classmethod
    def load(cls, files: ModelFiles) -> Tokenizer:
        """Raises ModelFormatError."""
        try:
            backend = tokenizers.Tokenizer.from_buffer(_read(files.tokenizer))
        except ModelFormatError:
            raise
        except Exception as error:  # tokenizers raises nothing more special
            raise ModelFormatError(
                f"{files.tokenizer} is no tokenizer: {_one_line(error)}."
            ) from error
        # The files may ask for cut or filled-up texts, as training wants them.
        backend.no_truncation()
        backend.no_padding()
        config = _json(files.tokenizer_config)
        texts = {
            name: _token_text(config.get(f"{name}_token")) for name in ("bos", "eos", "unk", "pad")
        }
        eos_ids = _ids(_json(files.generation_config)) | _ids(_json(files.config))
        eos_id = None if texts["eos"] is None else backend.token_to_id(texts["eos"])
        if eos_id is not None:
            eos_ids |= {eos_id}
        source = _template_source(files, config)
        special = {f"{name}_token": text for name, text in texts.items() if text is not None}
        return cls(
            backend,
            bos_token=texts["bos"],
            eos_token=texts["eos"],
            eos_ids=sorted(eos_ids),
            chat_template=None if source is None else ChatTemplate(source, special),
        )

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_chars: int | None = None
    ) -> list[int]:
        """Ids of a text; special tokens written in it become their ids.

        Linear in the text's length; a text above max_chars, or one that is no Unicode, is an InvalidRequest.
        """
        if max_chars is not None and len(text) > max_chars:
            raise InvalidRequest(
                f"The text has {len(text)} characters, at most {max_chars} are accepted."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "The text holds half of a surrogate pair, which is no character."
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> Detokenizer:
        """For the ids of one answer, as they come; `prompt` decides whether its first word keeps a leading space."""
        return Detokenizer(
            self._backend,
            skipped_ids=self._special_ids if skip_special_tokens else frozenset(),
            byte_ids=self._byte_ids,
            prompt=prompt,
        )

    def is_special(self, token_id: int) -> bool:
        """Whether decode leaves it out by default."""
        return token_id in self._special_ids

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text, its leading space included; special tokens as they are written."""
        text = self.decode([*self._anchor, token_id], skip_special_tokens=False)
        return text.removeprefix(self._anchor_text)


def _byte_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Tokens that stand for one byte, where the decoder puts runs of them together."""
    decoder = backend.decoder
    if decoder is None or b"ByteFallback" not in decoder.__getstate__():
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(item for item in ids if item is not None)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelFormatError(f"{path} is larger than {_MAX_JSON_BYTES} bytes.")
        return path.read_bytes()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from error


def _json(path: Path | None) -> Mapping[str, object]:
    if path is None:
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is no JSON.") from error
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path} is no JSON object.")
    return value


def _token_text(entry: object) -> str | None:
    """Special tokens are written as text or as an object with their text."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _ids(config: Mapping[str, object]) -> set[int]:
    """eos_token_id of a config: an id, a list of ids, or nothing."""
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {item for item in values if type(item) is int and item >= 0}


def _template_source(files: ModelFiles, config: Mapping[str, object]) -> str | None:
    """The file of its own goes before tokenizer_config.json, where several named ones may stand."""
    if files.chat_template is not None:
        try:
            return _read(files.chat_template).decode()
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{files.chat_template} is no UTF-8.") from error
    match config.get("chat_template"):
        case str(source):
            return source
        case [*entries]:
            named = {
                entry["name"]: entry["template"]
                for entry in entries
                if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
            }
            default = named.get("default")
            return default if isinstance(default, str) else None
        case _:
            return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
