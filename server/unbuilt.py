"""Fields that are known but not served yet: refused by name unless their value is no use of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import NotBuilt

Neutral = tuple[Any, ...]
"""Values that ask for nothing; None always is one."""

_BOTH: Mapping[str, Neutral] = {
    "n": (1,),
    "best_of": (1,),
    "response_format": ({"type": "text"}, {}),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "grammar": (),
    "adapter_id": ("",),
    "lora": ([],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "prompt_logprobs": (0,),
    "echo": (False,),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "watermark": (False,),
    "mm_processor_kwargs": ({},),
}

CHAT: Mapping[str, Neutral] = {
    **_BOTH,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "tool_prompt": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "reasoning_effort": ("none",),
    "reasoning": ({},),
    "verbosity": ("medium",),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}

COMPLETION: Mapping[str, Neutral] = {
    **_BOTH,
    "suffix": ("",),
    "prompt_embeds": (),
}

NATIVE: Mapping[str, Neutral] = {
    "best_of": (1,),
    "watermark": (False,),
    "decoder_input_details": (False,),
    "grammar": (),
    "adapter_id": ("",),
}

MESSAGE: Mapping[str, Neutral] = {
    "tool_calls": ([],),
    "tool_call_id": ("",),
    "function_call": (),
    "audio": (),
    "refusal": ("",),
}


def refuse_unbuilt(
    fields: Mapping[str, Any] | None, known: Mapping[str, Neutral], where: str = ""
) -> None:
    """Raises NotBuilt for the first of `fields` that asks for something in `known`."""
    for name, value in (fields or {}).items():
        if name not in known or value is None:
            continue
        # 1 == True in Python, but true is no count and 1 no switch
        if any(value == one and type(value) is type(one) for one in known[name]):
            continue
        param = f"{where}{name}"
        raise NotBuilt(param, f"`{param}` is not served yet; leave it out")
