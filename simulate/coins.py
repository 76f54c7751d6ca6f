r"""Coins by address: a draw is a pure function of a key and a counter, so nothing is streamed and nothing is stored.

Threefry-2x32 with 13 rounds (Salmon, Moraes, Dror and Shaw 2011: the fewest that pass Crush, BigCrush being passed
too; JAX's own generator is the same function with 20 rounds). Key: two words a lane. Counter: the number of the round
and that of the draw within it. Every policy that reads address (lane, round, draw) finds the same 64 bits there, which
is all there is to common random numbers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key, UInt32

__all__ = ["ROTATIONS", "ROUNDS", "lane_keys", "words"]

ROUNDS = 13
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
PARITY = np.uint32(0x1BD11BDA)


def words(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two independent words of 32 random bits at an address; all parts uint32 of shapes that broadcast."""
    schedule = (*key, key[0] ^ key[1] ^ PARITY)
    first, second = counter[0] + schedule[0], counter[1] + schedule[1]
    for round_ in range(ROUNDS):
        turn = ROTATIONS[round_ % 8]
        first = first + second
        second = (second << np.uint32(turn)) | (second >> np.uint32(32 - turn))
        second = second ^ first
        if round_ % 4 == 3:
            injected = round_ // 4 + 1
            first = first + schedule[injected % 3]
            second = second + schedule[(injected + 1) % 3] + np.uint32(injected)
    return first, second


def lane_keys(key: Key[Array, ""], num_lanes: int) -> UInt32[Array, "2 B"]:
    """The key of each lane; the first lanes keep theirs if there are more."""
    own = jax.vmap(lambda lane: jr.key_data(jr.fold_in(key, lane)))(jnp.arange(num_lanes, dtype=jnp.uint32))
    return own.astype(jnp.uint32)[:, :2].T
