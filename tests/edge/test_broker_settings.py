"""Addresses and secrets of the broker: every mistake is named with its cure, and no password is ever shown."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.alerts.settings import BrokerSettings, parse_broker_url
from edge.errors import BrokerError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("url", "address", "tls", "login"),
    [
        ("mqtt://broker", "mqtt://broker:1883", False, None),
        ("mqtt://10.0.0.1:11883/", "mqtt://10.0.0.1:11883", False, None),
        ("mqtts://broker", "mqtts://broker:8883", True, None),
        ("mqtt://anna@broker:1", "mqtt://broker:1", False, "anna"),
    ],
)
def test_url_gives_host_port_and_login(url: str, address: str, tls: bool, login: str | None) -> None:  # noqa: FBT001
    settings = parse_broker_url(url)
    assert (settings.address, settings.tls, settings.login) == (address, tls, login)


@pytest.mark.parametrize(
    "url",
    ["", "broker", "http://broker", "mqtt://", "mqtt://:1883", "mqtt://b:0", "mqtt://b:70000", "mqtt://b:x", "mqtt://b/t",
     "mqtt://b c", "mqtt://[::1", "mqtt://b?x=1"],
)  # fmt: skip
def test_url_that_is_wrong_says_how_to_write_it(url: str) -> None:
    with pytest.raises(BrokerError, match="mqtt://host:port"):
        parse_broker_url(url)


def test_url_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(BrokerError, match="password_file") as caught:
        parse_broker_url("mqtt://anna:s3cret@broker")
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ValidationError, match="password_file"):
        BrokerSettings(url="mqtt://anna:s3cret@broker")


@given(st.text(max_size=30) | st.text(max_size=20).map("mqtt://{}".format))
def test_url_parser_raises_only_our_error(url: str) -> None:
    with contextlib.suppress(BrokerError):
        settings = parse_broker_url(url)
        assert settings.host
        assert 0 < settings.port < 65536


def test_settings_refuse_what_does_not_go_together(tmp_path: Path) -> None:
    for values in (
        {"password_file": tmp_path},
        {"url": "mqtts://b", "cert_file": tmp_path},
        {"ca_file": tmp_path},
        {"prefix": "a/#"},
        {"backoff_max_s": 9},
        {"unknown": 1},
    ):
        with pytest.raises(ValidationError):
            BrokerSettings(**values)  # type: ignore[arg-type]


def test_every_setting_has_title_and_description() -> None:
    for name, field in BrokerSettings.model_fields.items():
        assert field.title, name
        assert field.description, name


def test_password_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    settings = BrokerSettings(username="anna", password_file=file)
    with pytest.raises(SettingsError, match=f"password_file {file}: No such file"):
        settings.read_password()
    file.touch(mode=0o600)
    with pytest.raises(SettingsError, match="empty"):
        settings.read_password()
    file.write_text("s3cret\nsecond\n")
    assert settings.read_password() == "s3cret"
    assert "s3cret" not in repr(settings)
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        settings.read_password()
