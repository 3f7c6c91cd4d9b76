"""Makes a certificate authority, SuperLink's certificate for this machine and a key for each node; run as a script.

Run by the environment of the extra ``flower``, which has ``cryptography``: ``flower_keys.py FOLDER NODE [NODE ...]``.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOW = dt.datetime.now(dt.timezone.utc)
DAY = dt.timedelta(days=1)


def certificate(name: str, key: ec.EllipticCurvePrivateKey, *, issuer: str, by: ec.EllipticCurvePrivateKey) -> bytes:
    authority = by is key
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )
    if authority:
        uses = dict.fromkeys(
            ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"), False
        ) | {"key_agreement": False, "key_cert_sign": True, "crl_sign": True}
        usage = x509.KeyUsage(**uses, encipher_only=False, decipher_only=False)
        builder = builder.add_extension(usage, critical=True)
    else:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(by, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)


def write_secret(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


def main(folder: Path, nodes: list[str]) -> None:
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    plain = serialization.NoEncryption()
    (folder / "ca.pem").write_bytes(certificate("test authority", authority, issuer="test authority", by=authority))
    (folder / "server.pem").write_bytes(certificate("superlink", server, issuer="test authority", by=authority))
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    write_secret(folder / "server.key", server.private_bytes(pem, pkcs8, plain))
    for node in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        write_secret(folder / node, key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, plain))
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"{node}.pub").write_bytes(public)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
