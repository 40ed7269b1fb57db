"""What was published is compared with what is there, down to the bit."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nightschool.errors import Damaged, NotFound
from nightschool.store.manifest import read_manifest, verify, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "v" / "sub").mkdir(parents=True)
    (tmp_path / "v" / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "v" / "sub" / "b.txt").write_text("hello")
    (tmp_path / "v" / "empty").write_text("")
    write_manifest(tmp_path / "v", parent="a@20261121_023000", score=1.5, nested={"x": [None]})
    return tmp_path / "v"


def test_a_whole_folder_verifies_and_tells_its_facts(folder):
    manifest = verify(folder, digests=True)
    assert manifest.facts == {"parent": "a@20261121_023000", "score": 1.5, "nested": {"x": [None]}}
    assert set(manifest.files) == {"model.safetensors", "sub/b.txt", "empty"}
    assert manifest.size_bytes == 261
    assert manifest == read_manifest(folder)


def test_without_a_manifest_it_does_not_exist(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(NotFound, match="never finished"):
        verify(folder, digests=False)


def test_a_missing_file(folder):
    (folder / "sub" / "b.txt").unlink()
    with pytest.raises(Damaged, match=r"sub/b\.txt is missing \(0 files\), but its manifest lists it with 5 bytes"):
        verify(folder, digests=False)


def test_an_additional_file(folder):
    (folder / "sub" / "c.txt").write_text("x")
    with pytest.raises(Damaged, match=r"sub/c\.txt is additional \(1 bytes\): its manifest lists 3 files"):
        verify(folder, digests=False)


def test_a_truncated_file(folder):
    os.truncate(folder / "model.safetensors", 200)
    with pytest.raises(Damaged, match=r"model\.safetensors has 200 bytes, but its manifest says 256"):
        verify(folder, digests=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(bit=st.integers(0, 256 * 8 - 1))
def test_a_flipped_bit(folder, bit):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        verify(folder, digests=False)
        with pytest.raises(
            Damaged, match=r"model\.safetensors has the SHA-256 [0-9a-f]{64}, but its manifest says [0-9a-f]{64}"
        ):
            verify(folder, digests=True)
    finally:
        path.write_bytes(bytes(range(256)))


def test_a_manifest_with_a_bit_of_any_byte_flipped_is_damaged_or_means_the_same(folder):
    path = folder / "manifest.json"
    original, manifest = path.read_bytes(), read_manifest(folder)
    refused = 0
    for index in range(len(original)):
        content = bytearray(original)
        content[index] ^= 1 << index % 8
        path.write_bytes(content)
        try:
            assert read_manifest(folder) == manifest
        except Damaged:
            refused += 1
    assert refused > len(original) * 0.9


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_manifest_is_damaged(folder, share):
    path = folder / "manifest.json"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(Damaged, match=r"manifest\.json is not JSON"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "./a"])
def test_a_manifest_never_reaches_out_of_its_folder(folder, name, monkeypatch):
    monkeypatch.setattr("nightschool.store.manifest.json_digest", lambda content: "same")
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | {"digest": "same"}
    content["files"] = {name: {"sha256": "0", "size_bytes": 0}}
    path.write_text(json.dumps(content))
    with pytest.raises(Damaged, match="outside its folder"):
        verify(folder, digests=True)


def test_a_manifest_of_another_format_or_form_is_refused(folder, monkeypatch):
    monkeypatch.setattr("nightschool.store.manifest.json_digest", lambda content: "same")
    path = folder / "manifest.json"
    content = json.loads(path.read_text()) | {"digest": "same"}
    for change, match in (
        ({"format": 99}, "format 99, but this version of nightschool reads 1"),
        ({"files": {"a": {}}}, "form of a manifest"),
        ({"created_at": "yesterday"}, "form of a manifest"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(Damaged, match=match):
            read_manifest(folder)


def test_links_are_neither_published_nor_accepted(folder, tmp_path):
    (tmp_path / "outside").write_text("hello")
    (folder / "sub" / "b.txt").unlink()
    (folder / "sub" / "b.txt").symlink_to(tmp_path / "outside")
    with pytest.raises(Damaged, match=r"b\.txt is a link"):
        verify(folder, digests=True)
    with pytest.raises(Damaged, match=r"b\.txt is a link"):
        write_manifest(folder)
