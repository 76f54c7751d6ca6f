"""Uniforms by address: the randomness of recording and decoding.

Every uniform has an address (seed, request id, purpose, position, step) and is computed from it by the counter-based
generator Philox: the first four choose the stream, the step is the place in it. Batching, sharding, order of
requests, or asking for fewer steps cannot change a draw. A request's id is the hash of its prompt and how many
equal prompts came before it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["request_id", "request_ids", "stream", "uniforms"]


def request_id(prompt: Sequence[int], occurrence: int = 0) -> str:
    """Stable name of a request: SHA-256 of its prompt's tokens, then which of the equal prompts it is."""
    digest = hashlib.sha256(np.asarray(prompt, dtype="<i8").tobytes()).hexdigest()
    return f"{digest}-{occurrence}"


def request_ids(prompts: Sequence[Sequence[int]]) -> list[str]:
    """The id of each prompt of a list, equal prompts numbered in order."""
    seen: Counter[tuple[int, ...]] = Counter()
    out = []
    for prompt in prompts:
        key = tuple(prompt)
        out.append(request_id(key, seen[key]))
        seen[key] += 1
    return out


def stream(seed: int, request: str, purpose: str, position: int = 0) -> np.random.Generator:
    """The generator at an address; its n-th uniform is step n."""
    digest = hashlib.sha256(f"{seed}/{request}/{purpose}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    # The position sits in the counter's highest word and steps count up the lowest: streams cannot overlap.
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, position], np.uint64)))


def uniforms(seed: int, request: str, purpose: str, positions: int, steps: int = 1) -> np.ndarray:
    """[positions, steps] uniforms in [0, 1) of one request and purpose."""
    return np.stack([stream(seed, request, purpose, j).random(steps) for j in range(positions)])
