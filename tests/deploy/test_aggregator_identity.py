"""The folder of boxes: one key for each, read while the service runs, and never a key that stands for two."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.aggregator.identity import Registry, enrol, file_name, read_boxes, revoke
from edge.errors import SettingsError
from edge.federation.keys import certificate, make_keys

if TYPE_CHECKING:
    from pathlib import Path

# Half of it what a file name must not hold, or what would read as its own escape.
_part = st.text(st.sampled_from("ab%2F. \\:é*?"), min_size=1, max_size=6).filter(lambda part: part == part.strip())
_names = st.tuples(_part, _part).map("/".join)


@given(_names, _names)
def test_file_name_is_safe_and_unique(first: str, second: str) -> None:
    name = file_name(first)
    assert "/" not in name
    assert name not in (".", "..")
    assert (file_name(second) == name) == (first == second)


@pytest.mark.parametrize("box", ["../..", "./..", "..%2F/x", "a%2Fb/c", "büro/linie 3"])
def test_enrolled_box_is_found_whatever_its_name(tmp_path: Path, box: str) -> None:
    keys = make_keys()
    path = enrol(tmp_path / "boxes", box, keys.public)
    assert path.parent == tmp_path / "boxes"
    assert [entry.name for entry in tmp_path.iterdir()] == ["boxes"]
    assert read_boxes(tmp_path / "boxes").names == {keys.public: box}


def test_enrolling_again_changes_nothing(tmp_path: Path) -> None:
    keys = make_keys()
    assert enrol(tmp_path, "plant/a", keys.public) == enrol(tmp_path, "plant/a", keys.public)


def test_one_key_for_two_names_is_refused(tmp_path: Path) -> None:
    keys = make_keys()
    enrol(tmp_path, "plant/a", keys.public)
    with pytest.raises(SettingsError, match="key of 'plant/a'"):
        enrol(tmp_path, "plant/b", keys.public)


def test_two_keys_for_one_name_are_refused(tmp_path: Path) -> None:
    enrol(tmp_path, "plant/a", make_keys().public)
    with pytest.raises(SettingsError, match="another key already; revoke"):
        enrol(tmp_path, "plant/a", make_keys().public)


def test_revoked_key_is_never_enrolled_again(tmp_path: Path) -> None:
    old, new = make_keys(), make_keys()
    enrol(tmp_path, "plant/a", old.public)
    revoke(tmp_path, "plant/a")
    boxes = read_boxes(tmp_path)
    assert (dict(boxes.names), dict(boxes.revoked)) == ({}, {old.public: "plant/a"})
    with pytest.raises(SettingsError, match="was revoked"):
        enrol(tmp_path, "plant/a", old.public)
    enrol(tmp_path, "plant/a", new.public)
    assert read_boxes(tmp_path).names == {new.public: "plant/a"}


def test_revoking_an_unknown_box_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no key"):
        revoke(tmp_path, "plant/a")


def test_shared_key_in_the_folder_counts_for_nobody(tmp_path: Path) -> None:
    """Copied by hand: whose key it is cannot be known, so neither box is let in and both are named."""
    shared, own = make_keys(), make_keys()
    for box, key in (("plant/a", shared), ("plant/b", shared), ("plant/c", own)):
        (tmp_path / file_name(box)).write_text(certificate(key.public))
    boxes = read_boxes(tmp_path)
    assert boxes.names == {own.public: "plant/c"}
    assert len(boxes.problems) == 1
    assert "plant/a and plant/b" in boxes.problems[0]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("plant%2Fa.key", certificate(make_keys().public, box="plant/b"), "holds a key of 'plant/b'"),
        ("plant%2fa.key", certificate(make_keys().public), "rename it to plant%2Fa.key"),
        ("plant.key", certificate(make_keys().public), "<site>/<box>"),
        ("plant%2Fa.key", "nonsense", "not a certificate"),
    ],
)
def test_unclear_file_counts_for_nothing_and_is_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    good = make_keys()
    enrol(tmp_path, "plant/good", good.public)
    (tmp_path / name).write_text(text)
    boxes = read_boxes(tmp_path)
    assert boxes.names == {good.public: "plant/good"}
    assert len(boxes.problems) == 1
    assert words in boxes.problems[0]
    assert name in boxes.problems[0]


def test_key_beside_its_revocation_counts_for_nothing(tmp_path: Path) -> None:
    """As a process that dies between the two steps of a revocation leaves it."""
    keys = make_keys()
    enrol(tmp_path, "plant/a", keys.public)
    revoke(tmp_path, "plant/a")
    (tmp_path / file_name("plant/a")).write_text(certificate(keys.public, box="plant/a"))
    assert not read_boxes(tmp_path).names


def test_registry_follows_the_folder(tmp_path: Path) -> None:
    first, second = make_keys(), make_keys()
    enrol(tmp_path, "plant/a", first.public)
    registry = Registry(tmp_path)
    assert not registry.refresh()
    enrol(tmp_path, "plant/b", second.public)
    assert registry.refresh()
    assert registry.boxes.names == {first.public: "plant/a", second.public: "plant/b"}
    revoke(tmp_path, "plant/a")
    assert registry.refresh()
    assert registry.boxes.names == {second.public: "plant/b"}
    (tmp_path / file_name("plant/b")).unlink()
    assert registry.refresh()
    assert not registry.boxes.names


def test_registry_sees_a_file_changed_in_place(tmp_path: Path) -> None:
    path = enrol(tmp_path, "plant/a", make_keys().public)
    registry = Registry(tmp_path)
    other = make_keys()
    before = path.stat()
    path.write_text(certificate(other.public, box="plant/a"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert registry.refresh()
    assert registry.boxes.names == {other.public: "plant/a"}


def test_missing_folder_is_refused_and_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="aggregate enrol"):
        Registry(tmp_path / "none")


def test_folder_that_vanishes_leaves_the_last_reading(tmp_path: Path) -> None:
    keys = make_keys()
    enrol(tmp_path / "boxes", "plant/a", keys.public)
    registry = Registry(tmp_path / "boxes")
    (tmp_path / "boxes").rename(tmp_path / "away")
    with pytest.raises(SettingsError):
        registry.refresh()
    assert registry.boxes.names == {keys.public: "plant/a"}
