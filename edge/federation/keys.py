"""CURVE keys of boxes and aggregators, in ZeroMQ's certificate files. It must not know sockets or who may connect."""

from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq
from zmq.utils import z85

from edge.alerts.topics import check_segment
from edge.errors import MessageError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105 (the end of a file name)
# Both keys and a name of 2 x 200 characters need far less; a wrong file named by mistake is not read into memory.
MAX_FILE_BYTES = 4096
_KEY_CHARACTERS = 40
_LINE = re.compile(r"(?P<name>[a-z-]+)\s*=\s*\"?(?P<value>[^\"]*)\"?")


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A Curve25519 key pair in Z85 (ZeroMQ RFC 32), 40 characters each; the secret is never shown.

    Attributes:
        public: the half that others may know.
        secret: the half that proves who one is.
    """

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key as it travels from a box to the aggregator's operator.

    Attributes:
        key: Z85, 40 characters.
        box: ``<site>/<box>``, where the file says so; else empty.
    """

    key: str
    box: str = ""


def make_keys() -> KeyPair:
    """Draw a key pair from the system's random numbers."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode("ascii"), secret.decode("ascii"))


def check_key(text: str) -> str:
    """Return a key as it came.

    Raises:
        SettingsError: it is no Z85 text of 32 bytes; the message does not repeat it, since it may be a secret.
    """
    try:
        raw = z85.decode(text.encode("ascii"))
        valid = len(text) == _KEY_CHARACTERS and z85.encode(raw).decode("ascii") == text
    except (KeyError, ValueError, struct.error):
        valid = False
    if not valid:
        raise SettingsError(f"a CURVE key is {_KEY_CHARACTERS} characters of Z85; copy the whole key, or its file")
    return text


def check_box_name(name: str) -> str:
    """Return a box's name ``<site>/<box>`` as it came.

    Raises:
        SettingsError: it is not two names that could stand in the box's topics.
    """
    parts = name.split("/")
    # Certificate files have no way to escape a quotation mark.
    if len(parts) != 2 or '"' in name:  # noqa: PLR2004 (site and box)
        raise SettingsError(f"box {name!r}: name it <site>/<box>, as in its settings, without quotation marks")
    try:
        for part, what in zip(parts, ("site", "box"), strict=True):
            check_segment(part, field=what)
    except MessageError as error:
        raise SettingsError(f"box {name!r}: {error}") from error
    return name


def write_keys(folder: Path, keys: KeyPair, *, name: str, box: str = "") -> tuple[Path, Path]:
    """Write a pair as ``<name>.key`` (public) and ``<name>.key_secret`` (both halves, mode 0600).

    Args:
        folder: made if missing.
        keys: the pair.
        name: first part of both file names.
        box: ``<site>/<box>`` to note in both, if any.

    Returns:
        The public file and the secret one.

    Raises:
        SettingsError: one of them exists already, or cannot be written.
    """
    public, secret = folder / f"{name}{PUBLIC_SUFFIX}", folder / f"{name}{SECRET_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(secret, certificate(keys.public, secret=keys.secret, box=box), mode=0o600)
        _write_new(public, certificate(keys.public, box=box), mode=0o644)
    except FileExistsError as error:
        raise SettingsError(
            f"{error.filename} exists; whoever replaces a key must enrol the new one: move the old files away first"
        ) from error
    except OSError as error:
        raise SettingsError(f"{folder}: keys cannot be written ({error.strerror}); name another folder") from error
    return public, secret


def certificate(public: str, *, secret: str = "", box: str = "") -> str:
    """Return the text of a certificate file, as CZMQ's zcert and ``zmq.auth.load_certificate`` read it."""
    lines = ["# CURVE key of Lineward." + (" SECRET: it stays on this machine, mode 0600." if secret else " Public.")]
    lines += ["metadata"] + ([f'    box = "{box}"'] if box else [])
    lines += ["curve", f'    public-key = "{public}"'] + ([f'    secret-key = "{secret}"'] if secret else [])
    return "\n".join(lines) + "\n"


def read_public_key(path: Path) -> PublicKey:
    """Read the public key of a certificate file; a secret one in the same file is ignored.

    Raises:
        SettingsError: the file cannot be read, or is not a certificate with one public key.
    """
    values = _read(path, secret=False)
    box = values.get("box", "")
    try:
        return PublicKey(check_key(values["public-key"]), check_box_name(box) if box else "")
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def read_key_pair(path: Path) -> KeyPair:
    """Read a secret certificate file.

    Raises:
        SettingsError: it cannot be read, is open to anybody but its owner, holds no secret key, or its two halves do
            not belong together.
    """
    values = _read(path, secret=True)
    if "secret-key" not in values:
        raise SettingsError(f"{path}: holds no secret key; name the file that ends in {SECRET_SUFFIX}")
    try:
        keys = KeyPair(check_key(values["public-key"]), check_key(values["secret-key"]))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    if zmq.curve_public(keys.secret.encode("ascii")).decode("ascii") != keys.public:
        raise SettingsError(f"{path}: its public and secret key do not belong together; make new ones: lineward key")
    return keys


def _write_new(path: Path, text: str, *, mode: int) -> None:
    """Write a file that must not exist, never readable by more than ``mode`` says, and sync it to disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(handle)


def _read(path: Path, *, secret: bool) -> dict[str, str]:
    """Return the values of a certificate file (ZPL, ZeroMQ RFC 4, as far as certificates use it)."""
    cure = "make keys with: lineward key --out DIR"
    try:
        with path.open("rb") as file:
            # Of the open file: a path could be exchanged between check and read.
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"{path} holds a secret and is open to other users; run: chmod 600 {path}")
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not a certificate file; {cure}") from error
    values: dict[str, str] = {}
    for line in (line.strip() for line in lines):
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        if found["name"] in values:
            raise SettingsError(f"{path}: gives {found['name']} twice; one file holds one key")
        values[found["name"]] = found["value"]
    if len(content) > MAX_FILE_BYTES or "public-key" not in values:
        raise SettingsError(f"{path}: is not a certificate file with a public-key; {cure}")
    return values
