"""Heads drawn at random and a small trace with hidden states, for the tests of acceptance heads. Needs torch."""

import numpy as np
import torch

from realmodels.head import AcceptanceHead, Head
from realmodels.pair import load_pair
from realmodels.record import record

WIDTH = 32
"""Of the tiny pair's hidden states."""


def tiny_pair():
    return load_pair("tiny", "tiny:1")


def some_prompts():
    rng = np.random.default_rng(4)
    return [rng.integers(2, 24, rng.integers(1, 7)).tolist() for _ in range(14)]


def recorded(pair, prompts, folder):
    return record(pair, prompts, folder, max_candidates=5, max_new_tokens=20, top_k=8, timing_repeats=0,
                  batch_size=4, store_hidden=True)  # fmt: skip


def a_head(variant="matched", seed=0, layers=2, **manifest):
    width = WIDTH + (2 if variant == "matched" else 0)
    module = AcceptanceHead(width, layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return Head(module.requires_grad_(False), manifest={"variant": variant, **manifest})


def state_after(pair, tokens):
    """The draft's last hidden state after the last token, without cache, batch or padding."""
    with torch.inference_mode():
        return pair.draft(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, -1]
