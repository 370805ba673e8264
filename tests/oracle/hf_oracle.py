"""Logits and greedy tokens of a Hugging Face directory by transformers on the CPU. Needs the `oracle` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def load(directory: Path, dtype: str) -> Any:
    """The model with every tensor of the file used and none made up; attention in plain steps ("eager")."""
    if int(transformers.__version__.split(".")[0]) < 5:
        raise RuntimeError(f"nested rope_parameters need transformers 5 or later, got {transformers.__version__}")
    # The pair that output_loading_info asks for is not in the annotations of transformers.
    pair: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=TORCH_DTYPES[dtype], attn_implementation="eager", output_loading_info=True
    )
    model, report = pair
    problems = {key: value for key, value in report.items() if value}
    if problems:
        raise RuntimeError(f"{directory}: transformers did not load the file as it is: {problems}")
    return model.eval()


@torch.no_grad()
def logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Float32 [T, vocab] from one pass without a cache."""
    return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: Any, tokens: Sequence[int], num_tokens: int) -> list[int]:
    """The most likely continuation through the KV cache, one token a pass; end-of-text tokens do not stop it."""
    out: list[int] = []
    step, cache = torch.tensor([list(tokens)]), None
    while len(out) < num_tokens:
        result = model(step, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(int(result.logits[0, -1].argmax()))
        step = torch.tensor([[out[-1]]])
    return out
