"""Key files: made once, secret to their owner, and refused in words that name the cure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner
from zmq.auth.certs import create_certificates, load_certificate

from edge.cli import app
from edge.errors import SettingsError
from edge.federation.keys import (
    certificate,
    check_box_name,
    check_key,
    make_keys,
    read_key_pair,
    read_public_key,
    write_keys,
)

if TYPE_CHECKING:
    from pathlib import Path


def test_keys_come_back_from_their_files(tmp_path: Path) -> None:
    keys = make_keys()
    public, secret = write_keys(tmp_path / "new", keys, name="box", box="plant/line 3")
    assert read_key_pair(secret) == keys
    assert (read_public_key(public).key, read_public_key(public).box) == (keys.public, "plant/line 3")
    assert keys.secret not in public.read_text()
    assert (secret.stat().st_mode & 0o777, public.stat().st_mode & 0o777) == (0o600, 0o644)


def test_secret_is_not_shown(tmp_path: Path) -> None:
    keys = make_keys()
    assert keys.secret not in repr(keys)
    path = tmp_path / "box.key_secret"
    path.write_text(certificate(keys.public[:-1], secret=keys.secret))
    path.chmod(0o600)
    with pytest.raises(SettingsError) as error:
        read_key_pair(path)
    assert keys.secret not in str(error.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    _, secret = write_keys(tmp_path, make_keys(), name="box")
    secret.chmod(mode)
    with pytest.raises(SettingsError, match="chmod 600"):
        read_key_pair(secret)


def test_files_are_those_of_zeromq(tmp_path: Path) -> None:
    keys = make_keys()
    public, secret = write_keys(tmp_path, keys, name="box")
    assert load_certificate(secret) == (keys.public.encode(), keys.secret.encode())
    assert load_certificate(public) == (keys.public.encode(), None)
    theirs, their_secret = create_certificates(tmp_path, "other", {"name": "x"})
    (tmp_path / "other.key_secret").chmod(0o600)
    pair = read_key_pair(tmp_path / their_secret)
    assert pair.public == read_public_key(tmp_path / theirs).key


def test_keys_never_replace_older_ones(tmp_path: Path) -> None:
    keys = make_keys()
    _, secret = write_keys(tmp_path, keys, name="box")
    with pytest.raises(SettingsError, match="exists"):
        write_keys(tmp_path, make_keys(), name="box")
    assert read_key_pair(secret) == keys


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a certificate"),
        ("\x00\xff" * 30, "not a certificate"),
        ("x" * 5000, "not a certificate"),
        ('public-key = "abc"\nsecret-key = "abc"\n', "40 characters"),
        ("public-key = a\npublic-key = b\n", "twice"),
        (certificate(make_keys().public), "no secret key"),
        (certificate(make_keys().public, secret=make_keys().secret), "do not belong together"),
        (certificate("~" * 40, secret="#" * 40), "40 characters"),
    ],
)
def test_damaged_secret_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "box.key_secret"
    path.write_bytes(text.encode("latin-1"))
    path.chmod(0o600)
    with pytest.raises(SettingsError, match=words) as error:
        read_key_pair(path)
    assert str(path) in str(error.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lineward key"):
        read_key_pair(tmp_path / "none.key_secret")


@pytest.mark.parametrize("name", ["", "box", "a/b/c", "/b", "a/", "a/+", "a/ b", "$a/b", 'a/"b', "a/b\n"])
def test_invalid_box_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="box"):
        check_box_name(name)


@pytest.mark.parametrize("key", ["", "a" * 39, "a" * 41, "é" * 40, "~" * 40, "#" * 40])
def test_invalid_key_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="Z85"):
        check_key(key)


def test_key_verb_makes_keys_and_prints_the_public_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["key", "--out", str(tmp_path), "--box", "plant/line-3"])
    assert result.exit_code == 0, result.output
    pair = read_key_pair(tmp_path / "box.key_secret")
    assert pair.public in result.output
    assert pair.secret not in result.output
    assert read_public_key(tmp_path / "box.key").box == "plant/line-3"
    again = CliRunner().invoke(app, ["key", "--out", str(tmp_path)])
    assert isinstance(again.exception, SettingsError)
    assert read_key_pair(tmp_path / "box.key_secret") == pair
