r"""Train an acceptance head: weighted cross-entropy on soft labels, early stopping, the same bytes for the same seed.

With labels $a_t = \min(1, p/q)$, output $y_t$ and weight w on rejections the loss is that of the released code,

$$\frac{\sum_t w (1 - a_t) (-\ln(1 - y_t)) + a_t (-\ln y_t)}{\sum_t w (1 - a_t) + a_t} ,$$

whose minimiser is $y = m/(m + w(1 - m))$ (theory, F6). Of the published recipe the cosine schedule with 3 % warm-up is
kept; its 3 epochs in batches of 32 texts suit 40,000 texts, not the few here: epochs, batches, step size and weight
decay are ours. A part of the training half's requests is held back: training ends once its loss has not fallen for
`patience` epochs, and the best epoch's weights are kept. Blocks start by changing nothing and the last layer at a
logistic regression on the inputs beside the hidden state (also ours): a head that learns nothing is no worse than that.
"""

import copy
import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mdp.fit import split_requests
from mdp.trace import Trace
from realmodels.head import LAGS, VARIANTS, AcceptanceHead, Head
from realmodels.head_data import Examples, digest
from realmodels.sight import LIVE

__all__ = ["Recipe", "fit_requests", "soft_cross_entropy", "train_head"]

FIT_SHARE = 0.4
"""Share of all requests whose examples are fitted; the rest of the training half stops the training."""


@dataclass(frozen=True)
class Recipe:
    """How a head is trained.

    Attributes:
        depth: residual blocks, 0..64; rejection_weight: w > 0. SpecDec++'s shared configuration is 3 and 6 [note].
        shared_blocks: one block for all, as released.
        inputs: of `matched`: `hidden`, then some of `draft_prob`, `top_prob`, `entropy`; None: the variant's own.
        standardise: inputs to mean 0 and spread 1; None: all but `published`, whose files could not hold it.
        mixing_ratio: of `published` [code]: .15.
    """

    variant: str = "matched"
    depth: int = 1
    rejection_weight: float = 1.0
    shared_blocks: bool = True
    inputs: tuple[str, ...] | None = None
    standardise: bool | None = None
    mixing_ratio: float = 0.15
    max_epochs: int = 40
    patience: int = 6
    batch_size: int = 128
    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    warmup: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.inputs is not None and self.reads != VARIANTS[self.variant] and (
            self.variant == "published" or self.reads[:1] != ("hidden",) or len(set(self.reads)) < len(self.reads)
            or not set(self.reads[1:]) <= set(LIVE)
        ):  # fmt: skip
            allowed = "hidden alone" if self.variant == "published" else f"hidden, then some of {', '.join(LIVE)}"
            raise ValueError(f"inputs must be {allowed} for {self.variant} heads, got {', '.join(self.reads)}")
        for name, low, high in (("depth", 0, 64), ("max_epochs", 1, 10**6), ("patience", 1, 10**6),
                                ("batch_size", 1, 2**20), ("seed", 0, 2**63 - 1)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number in {low}..{high}, got {value!r}")
        for name, low, high in (("rejection_weight", 1e-6, 1e6), ("mixing_ratio", 0.0, 0.99), ("warmup", 0.0, 1.0),
                                ("learning_rate", 1e-8, 1.0), ("weight_decay", 0.0, 1e3)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        return VARIANTS[self.variant] if self.inputs is None else tuple(self.inputs)

    @property
    def standardises(self) -> bool:
        return self.variant != "published" if self.standardise is None else self.standardise


def soft_cross_entropy(logits: Tensor, accept_prob: Tensor, rejection_weight: float) -> Tensor:
    """The loss of the module docstring; logits [n, 2], index 1 is "accept"."""
    log_prob = torch.log_softmax(logits, -1)
    rejected = rejection_weight * (1.0 - accept_prob)
    total = -(rejected * log_prob[:, 0] + accept_prob * log_prob[:, 1]).sum()
    return total / (rejected + accept_prob).sum()


def fit_requests(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Requests to fit on and to stop by: together they are the training half of `mdp.fit.split_requests`.

    Raises:
        ValueError: if the training half has but one prompt.
    """
    half, _ = split_requests(trace)
    fitted, _ = split_requests(trace, FIT_SHARE)
    held = np.setdiff1d(half, fitted)
    if len(held) == 0:
        raise ValueError("trace: a head needs at least 2 different prompts in the training half, one to stop by")
    return fitted, held


def train_head(trace: Trace, examples: Examples, recipe: Recipe, *, progress: bool | None = None) -> Head:
    """A head fitted to the training half's examples of the trace.

    Args:
        examples: `matched_examples` or `published_examples`, of the recipe's variant.
        progress: a bar with the time left on stderr; None: if it is a terminal.

    Raises:
        ValueError: if the trace has too few prompts, or the examples are not numbers.
    """
    fitted, held = (examples.of(part) for part in fit_requests(trace))
    if len(fitted.request) == 0 or len(held.request) == 0:
        raise ValueError("trace: no examples to train on")
    if not (torch.isfinite(examples.inputs).all() and torch.isfinite(examples.accept_prob).all()):
        raise ValueError("trace: hidden states and labels must be finite numbers")
    generator = torch.Generator().manual_seed(_address(recipe))
    mean = scale = None
    if recipe.standardises:
        mean = fitted.inputs.mean(0)
        scale = fitted.inputs.std(0, correction=0)
        scale = torch.where(scale > 1e-6 * (1.0 + mean.abs()), scale, 1.0)  # a constant input says nothing
        fitted, held = (replace(part, inputs=(part.inputs - mean) / scale) for part in (fitted, held))
    if examples.inputs.shape[1] < len(recipe.reads):
        raise ValueError(
            f"examples: they hold {examples.inputs.shape[1]} numbers, too few for {', '.join(recipe.reads)}"
        )
    module = AcceptanceHead(examples.inputs.shape[1], recipe.depth, recipe.shared_blocks)
    _initialise(module, fitted, recipe)
    losses, best = _descend(module, fitted, held, recipe, generator, progress)
    manifest = {
        "variant": recipe.variant,
        "rejection_weight": float(recipe.rejection_weight),
        "shared_blocks": recipe.shared_blocks,
        "lag": LAGS[recipe.variant],
        "inputs": list(recipe.reads),
        "calibration": {"odds_factor": float(recipe.rejection_weight)},
        "training": {
            **asdict(recipe), "inputs": list(recipe.reads), "standardise": recipe.standardises,
            "best_epoch": best, "epochs": len(losses) - 1,
            "validation_loss": losses[best], "num_examples": len(fitted.request),
            "num_validation_examples": len(held.request), "num_requests": len(np.unique(fitted.request)),
            "torch": torch.__version__,
        },
        "trace_sha256": digest(trace),
        "models": trace.manifest.get("models", {}),
        "sampling": trace.manifest.get("sampling", {}),
    }  # fmt: skip
    return Head(module.eval().requires_grad_(False), mean, scale, manifest)


def _address(recipe: Recipe) -> int:
    """Seed of this training's own draws: no two trainings of a grid share them."""
    name = f"{recipe.seed}/head/{recipe.variant}/{'+'.join(recipe.reads)}/{recipe.depth}/{recipe.rejection_weight!r}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def _initialise(module: AcceptanceHead, fitted: Examples, recipe: Recipe) -> None:
    """Start at what the inputs beside the hidden state tell: blocks that change nothing, a logistic regression behind.

    A head that learns nothing from the hidden state is then no worse than that; without other inputs it is a constant.
    """
    count = len(recipe.reads) - 1
    columns = fitted.inputs[:, fitted.inputs.shape[1] - count :].double()
    columns = torch.cat([columns, torch.ones(len(columns), 1, dtype=torch.float64)], 1)
    slope = torch.zeros(count + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([slope], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimiser.zero_grad()
        logit = columns @ slope
        value = soft_cross_entropy(
            torch.stack([torch.zeros_like(logit), logit], -1), fitted.accept_prob, recipe.rejection_weight
        )
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        last: Any = module.model[-1]
        last.weight[1, module.hidden_size - count :] = slope[:count].detach().float()
        last.bias[1] = slope[count].detach().float()


def _descend(
    module: AcceptanceHead, fitted: Examples, held: Examples, recipe: Recipe, generator: torch.Generator,
    progress: bool | None,
) -> tuple[list[float], int]:  # fmt: skip
    """Train in place; returns the held-back loss after each epoch, 0 first, and the epoch whose weights are kept."""
    size, weight = len(fitted.request), recipe.rejection_weight
    per_epoch = math.ceil(size / recipe.batch_size)
    steps, warm = recipe.max_epochs * per_epoch, max(1, int(recipe.warmup * recipe.max_epochs * per_epoch))
    decayed = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, 0.5 * (1.0 + math.cos(math.pi * min(1.0, n / steps))))
    )

    def loss() -> float:
        with torch.inference_mode():
            return float(soft_cross_entropy(module(held.inputs), held.accept_prob, weight))

    losses, best, kept = [loss()], 0, copy.deepcopy(module.state_dict())
    for epoch in _epochs(recipe.max_epochs, progress):
        for batch in torch.randperm(size, generator=generator).split(recipe.batch_size):
            optimiser.zero_grad()
            soft_cross_entropy(module(fitted.inputs[batch]), fitted.accept_prob[batch], weight).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        losses.append(loss())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"learning_rate: training diverged at {recipe.learning_rate:g}")
        if losses[-1] < losses[best]:
            best, kept = epoch, copy.deepcopy(module.state_dict())
        elif epoch - best >= recipe.patience:
            break
    module.load_state_dict(kept)
    return losses, best


def _epochs(count: int, wanted: bool | None) -> Iterator[int]:
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield from range(1, count + 1)
        return
    from tqdm.auto import tqdm

    yield from tqdm(range(1, count + 1), desc="training", unit="epoch", file=sys.stderr, leave=False)
