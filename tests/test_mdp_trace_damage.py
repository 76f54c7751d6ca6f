"""Trace folders that are damaged, or point elsewhere, name the file and the fault."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trace_folders import edit_manifest, recorded, refused

from mdp.trace import load, save


@pytest.fixture
def folder(tmp_path):
    save(recorded(), tmp_path / "trace")
    return tmp_path / "trace"


@given(st.data())
def test_any_flipped_byte_of_a_shard_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trace")
    save(recorded(num_requests=2), folder)
    shard = folder / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    shard.write_bytes(content)
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_shard_names_itself(folder, keep):
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


def test_bytes_that_are_no_safetensors_name_their_shard_even_if_the_hash_fits(folder):
    content = b"no safetensors at all"
    (folder / "shard-00000.safetensors").write_bytes(content)
    entry = {"file": "shard-00000.safetensors", "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, shards=[entry])
    refused(folder, r"shard-00000\.safetensors: shard is damaged")


def test_a_missing_shard_is_named(folder):
    (folder / "shard-00000.safetensors").unlink()
    refused(folder, r"shard-00000\.safetensors: shard is missing")


def test_a_folder_without_a_manifest_is_no_trace(folder, tmp_path):
    (folder / "manifest.json").unlink()
    refused(folder, "not a trace")
    refused(tmp_path / "nowhere", "not a trace")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"schema_version": 1}', '{"schema_version": 1, "shards": [{}]}',
             '{"schema_version": 1, "shards": 3}', "[" * 100_000]
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    refused(folder, "not a trace manifest")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(folder, version):
    edit_manifest(folder, schema_version=version)
    refused(folder, "schema_version must be 1, got")


CHANGES = {
    "no shards": ({"shards": []}, "has no shards"),
    "no candidates": ({"max_candidates": 0}, "max_candidates must be in 1..1024"),
    "a flag for a number": ({"max_candidates": True}, "max_candidates must be in 1..1024"),
    "one candidate more": ({"max_candidates": 5}, "a rollout has the wrong number of steps"),
    "one candidate less": ({"max_candidates": 3}, "a rollout has the wrong number of steps"),
    "a request too few": ({"request_ids": ["a"] * 5}, "request_ids must have one string a request"),
    "ids that are none": ({"request_ids": 3}, "request_ids must have one string a request"),
}


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_a_manifest_that_does_not_fit_is_refused(folder, changes, message):
    edit_manifest(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize("lacking", ["max_candidates", "request_ids"])
def test_a_manifest_that_lacks_a_key_is_refused(folder, lacking):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[lacking]
    path.write_text(json.dumps(manifest))
    refused(folder, lacking)


OUTSIDE = ["absolute", "../outside.safetensors", "sub/inside.safetensors", "..", ".", "", "manifest.json",
           "link.safetensors", "two\nlines.safetensors", "x" * 999 + ".safetensors", "nul\0.safetensors", 3,
           None]  # fmt: skip


@pytest.mark.parametrize("where", OUTSIDE, ids=[repr(where)[:30] for where in OUTSIDE])
def test_a_manifest_cannot_point_out_of_its_folder(folder, tmp_path, where):
    content = (folder / "shard-00000.safetensors").read_bytes()
    outside = tmp_path / "outside.safetensors"
    (folder / "sub").mkdir()
    for path in (outside, folder / "sub" / "inside.safetensors"):
        path.write_bytes(content)
    (folder / "link.safetensors").symlink_to(outside)
    where = str(outside) if where == "absolute" else where
    edit_manifest(folder, shards=[{"file": where, "sha256": hashlib.sha256(content).hexdigest()}])
    refused(folder, "must be a .safetensors file in the trace's own folder|is missing")


@pytest.mark.parametrize("measured", [[1], 5, "soon", True], ids=repr)
def test_measured_times_are_an_object_or_null(folder, measured):
    edit_manifest(folder, measured=measured)
    refused(folder, "measured must be an object")
    edit_manifest(folder, measured=None)
    assert load(folder).num_requests == 6
