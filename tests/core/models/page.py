"""docs/models.md, made of the cases that are compared; `scripts/docs` writes it."""

from __future__ import annotations

from chipset.core.models.families import FAMILIES

from .cases import CASES
from .harness import MAX_CONTEXT, NUM_DECODE, PROMPTS, TOLERANCE

MODELS = {
    "LlamaForCausalLM": "Llama 2 and 3, SmolLM 2",
    "MistralForCausalLM": "Mistral 7B",
    "MixtralForCausalLM": "Mixtral",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3, text only",
    "Qwen3ForCausalLM": "Qwen 3, dense",
    "Phi3ForCausalLM": "Phi-3, Phi-4",
    "BloomForCausalLM": "BLOOM",
}

PAGE = """# Models

<!-- Written by scripts/docs from tests/core/models/cases.py; a test keeps it so. -->

A checkpoint is served when the first name under `architectures` in its `config.json` is in this table. All are one
decoder with other flags (`core/models/decoder.py`), and `core/models/families.py` says how a config sets them. Keys
known to change a model in ways that are not served (`quantization_config`, other kinds of rope, …) are refused by name
when the server starts, and so are tensors that the architecture has no place for. No code that a config names is ever
run.

| architecture | models |
|---|---|
{models}

Rotary embeddings may be `default`, `linear`, `llama3`, `yarn` or `longrope` (Phi-3: `default` or `longrope`).
LongRoPE's long or short factors are chosen once, when the server starts, by the context that it serves.

## What is compared

Each row is a tiny random model (weights of standard deviation 0.5, norms and biases random too) that Transformers and
chipset run in float32 on the CPU. Prompts of {prompts} tokens share a batch, in uneven chunks over shuffled cache
blocks, then {num_decode} decode steps follow; the served context is {max_context}. The logits of every token differ
from those of one full forward in Transformers by at most {tolerance:g} of the largest. Then each fault is planted in
chipset, alone, and must make that comparison fail.

| model | architecture | shows | faults planted, all seen |
|---|---|---|---|
{cases}
"""


def page() -> str:
    """The whole file."""
    models = [f"| `{name}` | {MODELS[name]} |" for name in FAMILIES]
    cases = [
        f"| {case.name} | `{case.architecture}` | {case.mechanism} | "
        f"{len(case.faults)}: {', '.join(fault.name for fault in case.faults)} |"
        for case in CASES
    ]
    return PAGE.format(
        models="\n".join(models),
        cases="\n".join(cases),
        prompts=" and ".join(map(str, PROMPTS)),
        num_decode=NUM_DECODE,
        max_context=MAX_CONTEXT,
        tolerance=TOLERANCE,
    )
