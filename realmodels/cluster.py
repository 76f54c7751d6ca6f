"""Recording on Dask workers: each loads the pair once, and blocks go to whoever is free.

The process that asks loads no model and writes all the files; workers need no folder in common with it. What they
need is specstop with its models extra, and the models under the names given (a folder must be there on each).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

import torch

from mdp.trace import Trace
from realmodels.pair import ModelPair, load_pair
from realmodels.progress import Progress
from realmodels.prompts import about_source, tokenise
from realmodels.record import Block, Header, Plan, Settings, run
from realmodels.sampling import Sampling
from realmodels.templates import used_template
from realmodels.timing import measure_times
from simulate.cluster import client

__all__ = ["record_on_cluster"]

_LOADING = Lock()


def record_on_cluster(
    models: Mapping[str, Any],
    prompts: Sequence[tuple[str, dict]],
    out: str | Path,
    *,
    source: str = "",
    template: str = "chat",
    workers: int = 0,
    scheduler: str | None = None,
    part: tuple[int, int] = (1, 1),
    timing_repeats: int = 5,
    progress: bool | Callable[[int], Any] | None = None,
    **settings: Unpack[Settings],
) -> Trace | None:
    """As `realmodels.record.record_part`, on `workers` processes of this machine or behind a Dask scheduler.

    Args:
        models: arguments of `realmodels.pair.load_pair`, by name.
        prompts: as `realmodels.prompts.read_prompts` gives them; a worker's tokenizer reads them.
        source: where the prompts come from, for the manifest, which then says so; template: what words they get.
        scheduler: its address, as tcp://host:8786.

    Raises:
        ValueError: one line that names the argument, its value and what is allowed.
    """
    key = json.dumps(dict(models), sort_keys=True)
    threads = max(1, torch.get_num_threads() // workers) if workers else None
    with client(workers, scheduler) as (dask, as_completed):
        # What settings are wrong is found on a worker, before a file is written here.
        sampling = {name: value for name, value in settings.items() if name in Sampling.__dataclass_fields__}
        hidden = bool(settings.get("store_hidden"))
        asked = dask.submit(_describe, key, threads, list(prompts), template, sampling, hidden)
        header, tokens, used = asked.result()
        about = about_source(source) | {"template": used} if source else None  # the file is here, not with the worker
        plan = Plan.make(header, tokens, about_prompts=about, **settings)

        def results(blocks: Iterable[Block], bar: Progress) -> Iterator[tuple[int, Trace, dict[str, Any]]]:
            jobs = {dask.submit(_record, key, threads, block, pure=False): block for block in blocks}
            for job in as_completed(list(jobs)):
                block = jobs.pop(job)
                yield block.index, *job.result()
                bar.done(len(block.ids))
                job.release()

        def times(lengths: Sequence[int]) -> dict[str, Any]:
            job = dask.submit(
                _time, key, threads, plan.sampling.max_candidates, list(lengths), timing_repeats, tokens[0], pure=False
            )
            return job.result()

        return run(plan, Path(out), part, results, times, timing_repeats, progress)


@lru_cache(maxsize=1)
def _loaded(key: str) -> ModelPair:
    return load_pair(**json.loads(key))


def _pair(key: str, threads: int | None) -> ModelPair:
    """The pair, loaded once a worker."""
    if threads is not None:
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _LOADING:
        return _loaded(key)


def _describe(
    key: str, threads: int | None, prompts: list[tuple[str, dict]], template: str, sampling: dict[str, Any],
    hidden: bool,
) -> tuple[Header, list[list[int]], dict[str, str]]:  # fmt: skip
    pair = _pair(key, threads)
    tokens = tokenise(prompts, pair, template)
    pair.check_prompts(tokens, Sampling(**sampling))
    pair.check_hidden(hidden)
    return Header.of(pair), tokens, used_template(template, pair.tokenizer)


def _record(key: str, threads: int | None, block: Block) -> tuple[Trace, dict[str, Any]]:
    return block.record(_pair(key, threads), Progress())


def _time(
    key: str, threads: int | None, max_candidates: int, lengths: list[int], repeats: int, context: list[int]
) -> dict[str, Any]:
    return measure_times(_pair(key, threads), max_candidates, lengths, repeats, context=context)
