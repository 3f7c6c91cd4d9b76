"""TLS to the broker: the context of a connection, and what its errors mean in words that name the cure."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from edge.alerts.settings import check_readable, check_secret_file
from edge.errors import SettingsError

if TYPE_CHECKING:
    from edge.alerts.settings import BrokerSettings

# X509_V_ERR_* of OpenSSL's x509_vfy.h, as `ssl.SSLCertVerificationError.verify_code` has them.
_NOT_YET_VALID = 9
_EXPIRED = 10
_WRONG_NAME = frozenset({62, 64})
_UNKNOWN_AUTHORITY = frozenset({2, 18, 19, 20, 21})
# Alerts of the broker about our own certificate (RFC 8446, clause 6.2), as OpenSSL words them in errors of either side.
_ALERTS = (
    ("certificate required", "the broker asks for a client certificate; set cert_file and key_file"),
    ("handshake failure", "the broker ends the handshake; does it ask for a client certificate (cert_file, key_file)?"),
    ("certificate expired", "the broker says that our certificate has expired; have cert_file renewed"),
    ("certificate revoked", "the broker says that our certificate was revoked; have a new cert_file issued"),
    ("unknown ca", "the broker does not know who signed cert_file; have it issued by the broker's authority"),
    ("bad certificate", "the broker does not take our certificate; have cert_file issued by the broker's authority"),
    ("certificate unknown", "the broker does not take our certificate; have cert_file issued by its authority"),
    ("protocol version", "the broker and this box have no TLS version in common; the box needs TLS 1.2 or newer"),
    ("wrong version number", "the port does not speak TLS; use its TLS port, or an mqtt:// address"),
    ("record layer failure", "the port does not speak TLS; use its TLS port, or an mqtt:// address"),
)  # fmt: skip


def tls_context(settings: BrokerSettings) -> ssl.SSLContext:
    """The context of an mqtts connection: the broker's certificate and host name are always checked.

    Raises:
        SettingsError: a file cannot be read or is no PEM, or a key is open to everybody.
    """
    for key in ("ca_file", "cert_file", "key_file"):
        # OpenSSL's errors name no file.
        if (path := getattr(settings, key)) is not None:
            check_readable(key, path)
    if settings.key_file is not None:
        check_secret_file(settings.key_file)
    try:
        context = ssl.create_default_context(cafile=None if settings.ca_file is None else str(settings.ca_file))
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"ca_file {settings.ca_file}: {error}; name a PEM file with a certificate") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.cert_file is not None:
        try:
            # Without a password of its own, OpenSSL would ask the terminal for that of an encrypted key.
            context.load_cert_chain(
                str(settings.cert_file), None if settings.key_file is None else str(settings.key_file), password=""
            )
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"cert_file {settings.cert_file}, key_file {settings.key_file}: {error}; name PEM files of a "
                "certificate and its key, the key without a password"
            ) from error
    return context


def tls_trouble(error: ssl.SSLError | str, settings: BrokerSettings) -> str:
    """What an error of a TLS connection means, and its cure; empty for a text that names nothing of TLS.

    Args:
        error: of the handshake, or the text of one that came later.
        settings: of the connection.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {_verification(error, settings)}"
    text = str(error).lower().replace("_", " ")
    for words, meaning in _ALERTS:
        if words in text:
            return f"TLS: {meaning}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}; check ca_file, the broker's certificate and its host name"
    return ""


def _verification(error: ssl.SSLCertVerificationError, settings: BrokerSettings) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return (
            "the broker's certificate, or that of ca_file, has expired; renew it, and see whether this clock is right"
        )
    if code == _NOT_YET_VALID:
        return "the broker's certificate is not valid yet; see whether the clock of this machine is right"
    if code in _WRONG_NAME:
        return f"the broker's certificate is not for {settings.host}; use the name that is in it, or have one issued"
    if code in _UNKNOWN_AUTHORITY:
        return (
            f"the broker's certificate is not signed by an authority of ca_file ({error.verify_message}); name its CA"
        )
    return f"{error.verify_message}; check ca_file and the broker's certificate"
