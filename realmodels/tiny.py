"""A tiny pair built from a config: a two-layer Llama over 24 tokens, and a noisy copy of it.

No download, no tokenizer: prompts are token ids. Weights are drawn wide so that next-token laws are far from
uniform, and two of the 24 tokens end the text, so that end-of-text inside a block happens within a few dozen
tokens. The draft is the target plus seeded noise, at which mean acceptance is about .73.
"""

from typing import Any

import torch

__all__ = ["END_TOKEN_IDS", "tiny_draft", "tiny_target"]

VOCAB_SIZE = 24
END_TOKEN_IDS = (0, 1)
WEIGHT_SPREAD = 0.35
DRAFT_NOISE = 0.06


def tiny_target(seed: int) -> Any:
    """The target of the tiny pair."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=WEIGHT_SPREAD,
        bos_token_id=None, eos_token_id=list(END_TOKEN_IDS), pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def tiny_draft(target: Any, seed: int) -> Any:
    """The target plus noise of `DRAFT_NOISE` times each weight matrix's spread."""
    import copy

    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(seed)
    for weight in draft.parameters():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(DRAFT_NOISE * weight.std() * noise)
    return draft
