"""Recording in pieces: killed and gone on with, spread over parts and workers, merged; always the same trace."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.trace import load  # noqa: E402
from realmodels import journal  # noqa: E402
from realmodels.journal import merge  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record, record_part  # noqa: E402

torch.set_num_threads(1)

SETTINGS = {"max_candidates": 4, "max_new_tokens": 8, "top_k": 8, "batch_size": 3, "shard_size": 3, "timing_repeats": 1}
CLOCKS = ("measured", "recording", "versions")


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", "tiny")


def make_prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(count)]


PROMPTS = make_prompts(11)  # four blocks, the last a short one


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    """The trace that a process writes which is left alone."""
    folder = tmp_path_factory.mktemp("whole") / "trace"
    record(pair, PROMPTS, folder, **SETTINGS)
    return folder


def is_the_same_folder(one, other):
    """The same files with the same bytes, the manifest but for what clocks said."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and "manifest.json" in names
    for name in names:
        if name != "manifest.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (one, other)]
    for manifest in manifests:
        for key in CLOCKS:
            manifest.pop(key, None)
    assert manifests[0] == manifests[1]
    load(other)


# Imports once and forks: each attempt is a process of its own, killed like one, without its start-up.
DRIVER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from realmodels.pair import load_pair
from realmodels.record import record
import numpy as np

out, kills, blocks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(1)
prompts = [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(2 * blocks)]
pair = load_pair("tiny", "tiny")
record(pair, prompts[:2], f"{out}/warm", max_new_tokens=4, timing_repeats=1)  # what is imported late is there now


def attempt(folder):
    child = os.fork()
    if child:
        return child
    record(pair, prompts, folder, max_candidates=4, max_new_tokens=8, top_k=8, batch_size=2, shard_size=2,
           timing_repeats=1)
    os._exit(0)


def shards():
    return sum(name.endswith(".safetensors") for name in os.listdir(f"{out}/killed"))


assert os.waitpid(attempt(f"{out}/whole"), 0)[1] == 0
os.mkdir(f"{out}/killed")
moments = random.Random(7)
for _ in range(kills):
    # Somewhere within the work on a shard: at once, or that of the next one.
    wanted = shards() + moments.choice([0, 1, 1])
    child = attempt(f"{out}/killed")
    while shards() < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(1e-3)
    time.sleep(moments.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the recording is too short to be killed so often"
assert 2 < shards() < blocks, "killed too early or too late"
assert os.waitpid(attempt(f"{out}/killed"), 0)[1] == 0
"""


def killed_and_gone_on_with(tmp_path, kills, blocks):
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(kills), str(blocks)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    is_the_same_folder(tmp_path / "whole", tmp_path / "killed")


def test_killed_ten_times_and_gone_on_with_is_the_same_trace(tmp_path):
    killed_and_gone_on_with(tmp_path, kills=10, blocks=14)


@pytest.mark.slow
def test_killed_a_hundred_times_and_gone_on_with_is_the_same_trace(tmp_path):
    killed_and_gone_on_with(tmp_path, kills=100, blocks=200)


class Crash(BaseException):
    pass


def test_a_crash_between_any_two_steps_on_disk_is_gone_on_with(pair, tmp_path, monkeypatch):
    """Dies before and after each file that is made, renamed or removed."""
    steps = 0

    def dying(function, at, after):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == at and not after:
                raise Crash
            out = function(*arguments, **options)
            if steps == at:
                raise Crash
            return out

        return step

    prompts, settings = PROMPTS[:4], {**SETTINGS, "max_candidates": 2, "max_new_tokens": 3, "timing_repeats": 0}
    record(pair, prompts, tmp_path / "whole", **settings)
    at, crashed = 0, True
    while crashed:
        at += 1
        for after in (False, True):
            folder, steps, crashed = tmp_path / f"{at} {after}", 0, False
            with monkeypatch.context() as patch:
                for name in ("mkdir", "replace", "unlink"):
                    patch.setattr(Path, name, dying(getattr(Path, name), at, after))
                try:
                    record(pair, prompts, folder, **settings)
                except Crash:
                    crashed = True
            if not (folder / "manifest.json").exists() or (folder / "recording.json").exists():
                record(pair, prompts, folder, **settings)
            is_the_same_folder(tmp_path / "whole", folder)
    assert at == 11  # folder, settings, two shards and their notes, manifest, three files to tidy, and none


def interrupted(pair, folder, blocks=2, **changes):
    """A recording that stopped after some blocks."""
    seen = []

    def stop(count):
        seen.append(count)
        if len(seen) > blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(pair, PROMPTS, folder, **{**SETTINGS, **changes}, progress=stop)
    assert len(list(folder.glob("shard-*.safetensors"))) == blocks
    with pytest.raises(ValueError, match="not a trace"):
        load(folder)


def test_what_is_done_is_not_done_again(pair, whole, tmp_path, monkeypatch):
    interrupted(pair, tmp_path)
    told = []
    record(pair, PROMPTS, tmp_path, **SETTINGS, progress=told.append)
    assert told == [3, 2]
    is_the_same_folder(whole, tmp_path)
    with pytest.raises(ValueError, match="already holds a trace"):
        record(pair, PROMPTS, tmp_path, **SETTINGS)


def test_times_are_measured_once(pair, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_manifest", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            record(pair, PROMPTS, tmp_path, **SETTINGS)
    noted = json.loads((tmp_path / "times.json").read_text())
    trace = record(pair, PROMPTS, tmp_path, **SETTINGS)
    assert trace.manifest["measured"] == noted


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"temperature": 0.5}, "sampling.temperature 1.0, not 0.5"),
        ({"seed": 1}, "sampling.seed 0, not 1"),
        ({"max_new_tokens": 9}, "max_new_tokens 8, not 9"),
        ({"store_hidden": True}, "contents.hidden False, not True"),
        ({"shard_size": 4}, "shard_size 3, not 4"),
        ({"draft": "tiny:1"}, "models.draft.name 'tiny', not 'tiny:1'"),
        ({"prompts": PROMPTS[:-1]}, "of other prompts"),
    ],
)
def test_a_recording_of_something_else_is_not_gone_on_with(pair, tmp_path, change, what):
    interrupted(pair, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = load_pair("tiny", change["draft"]) if "draft" in change else pair
    settings = {key: value for key, value in {**SETTINGS, **change}.items() if key not in ("draft", "prompts")}
    with pytest.raises(ValueError, match=r"holds an unfinished recording .*; remove it or choose") as error:
        record(other, change.get("prompts", PROMPTS), tmp_path, **settings)
    assert what in str(error.value) and "\n" not in str(error.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_bar_shows_the_time_left(pair, tmp_path, capsys):
    interrupted(pair, tmp_path)
    record(pair, PROMPTS, tmp_path, **SETTINGS, progress=True)
    shown = capsys.readouterr().err
    assert "6.0 of 11 requests" in shown and "11.0 of 11 requests" in shown and " left" in shown


def test_damage_is_named(pair, tmp_path):
    interrupted(pair, tmp_path)
    shard, note = tmp_path / "shard-00001.safetensors", tmp_path / "shard-00001.json"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: missing or damaged .* remove shard-00001\.json"):
        record(pair, PROMPTS, tmp_path, **SETTINGS)
    note.write_text("{")
    with pytest.raises(ValueError, match=r"shard-00001\.json: damaged"):
        record(pair, PROMPTS, tmp_path, **SETTINGS)
    note.unlink()
    record(pair, PROMPTS, tmp_path, **SETTINGS)


def test_shards_of_nobody_knows_what_are_refused(pair, tmp_path):
    (tmp_path / "shard-00000.safetensors").write_text("?")
    with pytest.raises(ValueError, match=r"holds shard-00000\.safetensors, but no recording\.json"):
        record(pair, PROMPTS, tmp_path, **SETTINGS)


def test_parts_merge_to_the_same_trace(pair, whole, tmp_path):
    parts = [tmp_path / name for name in ("one", "two", "three")]
    for i, folder in enumerate(parts, 1):
        assert record_part(pair, PROMPTS, folder, (i, 3), **SETTINGS) is None
        with pytest.raises(ValueError, match="not a trace"):
            load(folder)
    assert sorted(path.name for path in parts[0].glob("*.safetensors")) == [
        "shard-00000.safetensors", "shard-00003.safetensors"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="2 of 4 shards are in none of the parts, such as 0"):
        merge(tmp_path / "out", parts[1:])
    trace = merge(tmp_path / "out", parts)
    is_the_same_folder(whole, tmp_path / "out")
    assert trace.manifest["measured"] == json.loads((parts[0] / "times.json").read_text())
    assert all((folder / "recording.json").exists() for folder in parts)
    with pytest.raises(ValueError, match="already holds a trace"):
        merge(tmp_path / "out", parts)
    with pytest.raises(ValueError, match="is a whole trace, no part of one"):
        merge(tmp_path / "again", [tmp_path / "out"])


def test_parts_in_one_folder_need_no_merge(pair, whole, tmp_path):
    assert record_part(pair, PROMPTS, tmp_path, (2, 2), **SETTINGS) is None
    assert record_part(pair, PROMPTS, tmp_path, (1, 2), **SETTINGS) is not None
    is_the_same_folder(whole, tmp_path)


def test_parts_that_do_not_belong_together(pair, tmp_path):
    parts = [tmp_path / name for name in ("one", "two")]
    for i, folder in enumerate(parts, 1):
        record_part(pair, PROMPTS, folder, (i, 2), **{**SETTINGS, "seed": i})
    with pytest.raises(ValueError, match=r"two: a recording with sampling\.seed 2, not 1 of .*one"):
        merge(tmp_path / "out", parts)
    with pytest.raises(ValueError, match=r"one: no part of a recording \(no recording\.json\)"):
        merge(tmp_path / "out", [parts[0] / "one"])
    note = parts[0] / "shard-00000.json"
    noted = note.read_text()
    note.write_text(json.dumps(json.loads(noted) | {"file": "../thesis.txt"}))
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"file must be shard-00000\.safetensors, got '\.\./thesis\.txt'"):
        merge(tmp_path / "out", parts[:1])
    note.write_text(noted)
    shard = min(parts[0].glob("*.safetensors"))
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"one/shard-00000\.safetensors: missing or damaged"):
        merge(tmp_path / "out", parts[:1])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"shard 5/9: there are 4 blocks of 3 requests"):
        record_part(pair, PROMPTS, tmp_path / "five", (5, 9), **SETTINGS)


def on_workers(whole, out, **where):
    from realmodels.cluster import record_on_cluster

    models = {"target": "tiny", "draft": "tiny"}
    prompts = [(f"prompt {i}", {"tokens": prompt}) for i, prompt in enumerate(PROMPTS)]
    record_on_cluster(models, prompts, out, **where, **SETTINGS)
    is_the_same_folder(whole, out)


def test_behind_a_scheduler_it_is_the_same_trace(whole, tmp_path, monkeypatch):
    distributed = pytest.importorskip("dask.distributed")
    from realmodels import cluster

    loads = []
    monkeypatch.setattr(cluster, "load_pair", lambda **models: loads.append(models) or load_pair(**models))
    cluster._loaded.cache_clear()
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as local:
        on_workers(whole, tmp_path / "trace", scheduler=local.scheduler_address)
    assert loads == [{"target": "tiny", "draft": "tiny"}]  # once, however many blocks


@pytest.mark.slow
def test_on_processes_of_our_own_it_is_the_same_trace(whole, tmp_path):
    pytest.importorskip("dask.distributed")
    on_workers(whole, tmp_path / "trace", workers=2)


def test_the_manifest_says_what_it_took(pair, whole):
    manifest = load(whole).manifest
    took, measured = manifest["recording"], manifest["measured"]
    names = {"target_path_token", "draft_step", "rollout_step", "scored_token", "prompt_token"}
    assert set(took["seconds_per"]) == names and all(value > 0 for value in took["seconds_per"].values())
    trace = load(whole)
    assert took["tokens"]["target_path"] == trace.num_positions
    assert took["tokens"]["rollout"] == took["tokens"]["rollout_score"] == len(trace.rollout_drafts_end)
    assert took["tokens"]["prompt"] == sum(map(len, PROMPTS))
    assert took["tokens_per_second"] == pytest.approx(trace.num_positions / took["seconds"])
    assert took["peak_memory"]["process"] > 2**20
    lengths = [entry["context_length"] for entry in measured["by_context"]]
    assert len(lengths) == 3 and lengths == sorted(lengths) and measured["context_length"] == lengths[1]
    met = np.concatenate(
        [len(prompt) + np.arange(n) for prompt, n in zip(PROMPTS, np.diff(trace.offsets), strict=True)]
    )
    # of a part of the blocks these are the quantiles of what that part met; one process meets all
    assert lengths == [int(q) for q in np.quantile(met, [0.1, 0.5, 0.9])]
