"""An unfinished recording on disk, so that a killed one goes on, and one spread over processes comes together.

Requests are cut into *blocks*, each of which becomes one shard; nothing in a shard depends on the other blocks. Beside
the shards stand, until all are done,

* `recording.json`: everything that decides what is recorded (models, sampling, prompts, contents, sizes),
* `shard-00003.json` for each shard that is done: its hash, the hash of the settings, and what it took,
* `times.json`: the measured times, once they are.

Each file is written whole or not at all, a shard before its own `.json`, `manifest.json` last. So a recording may be
killed at any moment, and the finished folder is that of one which was not, but for what clocks said. Several processes
may share the folder, each with its own part of the blocks; or each has its own, and `merge` joins them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdp.trace import Trace, atomic_write, load, write_manifest, write_shard
from realmodels.gguf_file import file_digest

__all__ = ["Journal", "check_folder", "merge"]

SETTINGS, TIMES, MANIFEST = "recording.json", "times.json", "manifest.json"
MAX_JOURNAL_BYTES = 64 * 2**20
# What an unfinished recording may leave: the files above, and the temporary ones of atomic writes.
_NAME = r"(?:shard-([0-9]{5,})\.(?:safetensors|json)|recording\.json|times\.json)"
_OURS = re.compile(_NAME)
_SCRAP = re.compile(rf"\.(?:{_NAME}|manifest\.json)\.[0-9a-f]{{8}}")
# In the settings, but not what the finished manifest starts with.
_SIZES = ("batch_size", "shard_size", "contents")

SECONDS_PER = {"target_path_token": "target_path", "draft_step": "draft_path", "rollout_step": "rollout",
               "scored_token": "rollout_score", "prompt_token": "prompt"}  # fmt: skip
"""What the manifest's seconds per token are of: `realmodels.coupled.WORK`."""


def check_folder(out: Path) -> list[Path]:
    """What an unfinished recording left in the folder, if it is there at all; anything else in it is refused.

    Raises:
        ValueError: one line that names the folder and what it holds.
    """
    if (out / MANIFEST).exists():
        raise ValueError(f"out: {out} already holds a trace")
    if not out.exists():
        return []
    if not out.is_dir():
        raise ValueError(f"out: {out} is not a folder")
    left = sorted(out.iterdir())
    for path in left:
        known = _OURS.fullmatch(path.name) or _SCRAP.fullmatch(path.name)
        if not known or path.is_symlink() or not path.is_file():
            raise ValueError(f"out: {out} is not empty (holds {path.name})")
    return left


class Journal:
    """The folder of one recording, or of a part of it.

    Attributes:
        settings: what is recorded; a folder begun with others is refused.
        part: (i, n): this process does blocks i - 1, i - 1 + n, ...
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], part: tuple[int, int] = (1, 1)):
        self.folder, self.part = folder, part
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it is read back
        self.digest = _digest(self.settings)
        self.num_blocks = -(-len(settings["request_ids"]) // settings["shard_size"])

    def open(self) -> "Journal":
        """Make the folder, or go on with the one there; returns self.

        Raises:
            ValueError: one line that names what is in the way, or how the recording there differs from this one.
        """
        out = self.folder
        if self.finished and (out / SETTINGS).exists():
            self._same(_settings(out))  # killed while it was tidied up
            return self
        left = check_folder(out)
        if (out / SETTINGS).exists():
            self._same(_settings(out))
        elif ours := [path.name for path in left if _OURS.fullmatch(path.name)]:
            raise ValueError(f"out: {out} is not empty (holds {ours[0]}, but no {SETTINGS} that says of what)")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: cannot make {out} ({error.strerror})") from error
        for path in left:
            scrap = _SCRAP.fullmatch(path.name)
            # Another process may be writing its own shards at this moment.
            if scrap and scrap[1] and int(scrap[1]) in self.mine:
                path.unlink(missing_ok=True)
        if not (out / SETTINGS).exists():
            _write(out / SETTINGS, self.settings)
        return self

    @property
    def mine(self) -> range:
        """The blocks of this part."""
        return range(self.part[0] - 1, self.num_blocks, self.part[1])

    @property
    def finished(self) -> bool:
        return (self.folder / MANIFEST).exists()

    def _same(self, theirs: Mapping[str, Any]) -> None:
        if found := _difference(theirs, self.settings):
            raise ValueError(
                f"out: {self.folder} holds an unfinished recording {found}; remove it or choose another folder"
            )

    def requests(self, block: int) -> range:
        """The requests of a block."""
        size = self.settings["shard_size"]
        return range(block * size, min((block + 1) * size, len(self.settings["request_ids"])))

    def entry(self, block: int) -> dict[str, Any] | None:
        """What is noted of a block that is done; None if it is not."""
        path = self.folder / f"shard-{block:05d}.json"
        try:
            entry = _read(path)
        except FileNotFoundError:
            return None
        if not isinstance(entry, dict) or entry.get("settings") != self.digest:
            raise ValueError(f"{path}: is of another recording; remove it")
        if entry.get("file") != path.with_suffix(".safetensors").name:  # `merge` writes under that name
            raise ValueError(f"{path}: file must be {path.stem}.safetensors, got {entry.get('file')!r:.60}")
        return entry

    def check(self, block: int) -> dict[str, Any] | None:
        """As `entry`, and that the shard is what was written.

        Raises:
            ValueError: one line that names the shard that is missing or damaged.
        """
        if (entry := self.entry(block)) is not None:
            shard = self.folder / f"shard-{block:05d}.safetensors"
            if not shard.is_file() or file_digest(shard) != entry["sha256"]:
                note = shard.with_suffix(".json").name
                raise ValueError(f"{shard}: missing or damaged (its hash is not that in {note}); remove {note} to redo")
        return entry

    def write(self, block: int, trace: Trace, took: Mapping[str, Any]) -> None:
        """Keep a block that is done."""
        steps = trace.rollout_drafts_end
        entry = write_shard(trace, self.folder, block) | {
            "settings": self.digest,
            "num_rollout_steps": 0 if steps is None else len(steps),
            "path_lengths": np.diff(trace.offsets).tolist(),
            "acceptance": float(trace.features["step_accept_prob"].sum(dtype=float)),
            **took,
        }
        _write(self.folder / f"shard-{block:05d}.json", entry)

    def times(self) -> dict[str, Any] | None:
        """The measured times; None if there are none yet."""
        try:
            return _read(self.folder / TIMES)
        except FileNotFoundError:
            return None

    def write_times(self, measured: Mapping[str, Any]) -> None:
        _write(self.folder / TIMES, measured)

    def finish(self) -> Trace | None:
        """The trace, if every block is done, by whomever; the journal is removed then."""
        if not self.finished:
            entries = [self.entry(block) for block in range(self.num_blocks)]
            done = [entry for entry in entries if entry is not None]
            if len(done) < len(entries) and not self.finished:
                return None
            if not self.finished:
                write_manifest(_manifest(self.settings, done, self.times()), self.folder)
        # What says that this was a recording goes last.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == SETTINGS):
            if _SCRAP.fullmatch(path.name) or (_OURS.fullmatch(path.name) and path.suffix == ".json"):
                path.unlink(missing_ok=True)
        return load(self.folder)


def merge(out: str | Path, parts: Sequence[str | Path]) -> Trace:
    """Join the folders of a recording's parts into the trace that one process would have written.

    The parts stay as they are. Measured times are those of the first part that has them.

    Raises:
        ValueError: one line that names a part that is none, is of another recording or is damaged, or a block that
            none of them holds.
    """
    out, folders = Path(out), [Path(part) for part in parts]
    if not folders:
        raise ValueError("merge: give the folders of the parts")
    opened = []
    for folder in folders:
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder}: is a whole trace, no part of one")
        try:
            settings = _settings(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder}: no part of a recording (no {SETTINGS})") from None
        if opened and (found := _difference(settings, opened[0].settings)):
            raise ValueError(f"{folder}: a recording {found} of {folders[0]}")
        opened.append(Journal(folder, settings))
    first = opened[0]
    holders: dict[int, tuple[Journal, dict[str, Any]]] = {}
    for block in range(first.num_blocks):
        for journal in opened:
            if (entry := journal.check(block)) is None:
                continue
            if block in holders and holders[block][1]["sha256"] != entry["sha256"]:
                raise ValueError(f"{journal.folder}: shard {block} is not that of {holders[block][0].folder}")
            holders.setdefault(block, (journal, entry))
    if lacking := [block for block in range(first.num_blocks) if block not in holders]:
        raise ValueError(
            f"merge: {len(lacking)} of {first.num_blocks} shards are in none of the parts, such as {lacking[0]}"
        )
    whole = Journal(out, first.settings).open()
    for block, (journal, entry) in holders.items():
        if journal.folder.resolve() != out.resolve():
            _link(journal.folder / entry["file"], out / entry["file"])
            _write(out / f"shard-{block:05d}.json", entry)
    times = next((noted for journal in opened if (noted := journal.times()) is not None), None)
    if times is not None:
        whole.write_times(times)
    trace = whole.finish()
    assert trace is not None
    return trace


def _manifest(
    settings: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], times: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The finished trace's manifest; what clocks said is under `measured` and `recording`, versions under theirs."""
    listed = ("file", "sha256", "num_requests", "num_positions")
    total = sum(entry["acceptance"] for entry in entries)
    manifest = {key: value for key, value in settings.items() if key not in _SIZES} | {
        "mean_acceptance": total / sum(entry["num_positions"] for entry in entries),
        "shards": [{key: entry[key] for key in listed} for entry in entries],
        "versions": _joined([entry["versions"] for entry in entries]),
        "recording": {key: settings[key] for key in _SIZES} | _work(entries),
    }
    return manifest if times is None else manifest | {"measured": times}


def _work(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens of each kind of work, seconds in all and per token, so that another recording can be planned."""
    kinds = sorted({kind for entry in entries for kind in entry["tokens"]})
    seconds = {kind: sum(entry["seconds"].get(kind, 0.0) for entry in entries) for kind in kinds}
    tokens = {kind: sum(entry["tokens"].get(kind, 0) for entry in entries) for kind in kinds}
    positions, total = sum(entry["num_positions"] for entry in entries), sum(entry["total"] for entry in entries)
    peaks = [entry["peak_memory"] for entry in entries]
    return {
        "seconds": total,
        "tokens_per_second": positions / total if total > 0 else None,
        "seconds_per": {
            name: seconds[kind] / tokens[kind] for name, kind in SECONDS_PER.items() if tokens.get(kind)
        },
        "tokens": tokens,
        "peak_memory": {key: max(peak.get(key, 0) for peak in peaks) for peak in peaks for key in peak},
        "machines": sorted({entry["machine"] for entry in entries}),
    }  # fmt: skip


def _joined(versions: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Versions of all shards; where they differ, all of them."""
    found: dict[str, set[str]] = {}
    for entry in versions:
        for name, value in entry.items():
            found.setdefault(name, set()).add(value)
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """In words, the first thing in which settings differ; empty if they do not."""
    theirs, ours = _flat(theirs), _flat(ours)
    if theirs.get("request_ids") != ours.get("request_ids") or theirs.get("prompts_sha256") != ours["prompts_sha256"]:
        return "of other prompts, not those"
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        if theirs.get(key) != ours.get(key) and not _is_a_name(key):
            return f"with {key} {theirs.get(key)!r:.60}, not {ours.get(key)!r:.60}"
    return ""


def _is_a_name(key: str) -> bool:
    """Models and prompts may be named in several ways; names, revisions and hashes say which they are."""
    return key.endswith(".spec") or key.startswith("prompts.")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.items():
        nested = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def _digest(settings: Mapping[str, Any]) -> str:
    """Hash of the settings, whatever the models were called."""
    named = {key: value for key, value in _flat(settings).items() if not _is_a_name(key)}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _link(source: Path, path: Path) -> None:
    """The same file under another name, or a copy where that cannot be."""
    path.unlink(missing_ok=True)
    try:
        os.link(source, path)
    except OSError:
        temporary = path.with_name(f".{path.name}.{'0' * 8}")
        shutil.copyfile(source, temporary)
        temporary.replace(path)


def _settings(folder: Path) -> dict[str, Any]:
    """What the recording in the folder is of."""
    found = _read(folder / SETTINGS)
    size, ids = (found.get(key) for key in ("shard_size", "request_ids")) if isinstance(found, dict) else (0, 0)
    if not isinstance(size, int) or size < 1 or not isinstance(ids, list) or not ids:
        raise ValueError(f"{folder / SETTINGS}: damaged; remove the folder")
    return found


def _read(path: Path) -> Any:
    if path.stat().st_size > MAX_JOURNAL_BYTES:
        raise ValueError(f"{path}: larger than {MAX_JOURNAL_BYTES} bytes")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: damaged; remove it") from None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    atomic_write(path, json.dumps(content, allow_nan=False).encode())
