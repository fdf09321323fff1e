"""TLS as the flags ask for it: real handshakes with certificates that are made here."""

from __future__ import annotations

import contextlib
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fake_ring import Live, call, live_frontend

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
PASSWORD = "four words and more"


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)


def signed(folder: Path, name: str, authority: str, *extensions: str) -> None:
    """NAME.pem and NAME.key, whose certificate `authority` vouches for."""
    key, ca = f"{name}.key", (f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
    openssl(folder, "req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", "csr", "-subj", f"/CN={name}")
    (folder / "extensions").write_text("\n".join(extensions))
    openssl(
        folder, "x509", "-req", "-in", "csr", "-CA", *ca, "-days", "2", "-out", f"{name}.pem", "-extfile", "extensions"
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two authorities, of a server (its key under a password), and of a client of each authority."""
    folder = tmp_path_factory.mktemp("tls")
    for authority in ("ca", "other"):
        openssl(
            folder, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{authority}.key", "-out",
            f"{authority}.pem", "-days", "2", "-subj", f"/CN={authority}",
        )  # fmt: skip
    signed(folder, "server", "ca", "subjectAltName=IP:127.0.0.1")
    openssl(folder, "rsa", "-aes256", "-passout", f"pass:{PASSWORD}", "-in", "server.key", "-out", "locked.key")
    signed(folder, "friend", "ca")
    signed(folder, "stranger", "other")
    return folder


def context(folder: Path, client: str | None = None, authority: str = "ca") -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=folder / f"{authority}.pem")
    if client is not None:
        made.load_cert_chain(folder / f"{client}.pem", folder / f"{client}.key")
    return made


def answer(live: Live, trust: ssl.SSLContext) -> int:
    with httpx.Client(base_url=f"https://127.0.0.1:{live.port}", verify=trust, timeout=20, trust_env=False) as client:
        return client.post("/generate", json=call("a")).status_code


def flags(folder: Path, key: str = "server.key") -> dict[str, Any]:
    return {"ssl_certfile": str(folder / "server.pem"), "ssl_keyfile": str(folder / key)}


@pytest.fixture(scope="module")
def plain_tls(certificates: Path) -> Iterator[Live]:
    with live_frontend(**flags(certificates, "locked.key"), ssl_keyfile_password=PASSWORD) as live:
        yield live


def test_a_key_under_a_password(certificates: Path, plain_tls: Live) -> None:
    assert answer(plain_tls, context(certificates)) == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        answer(plain_tls, context(certificates, authority="other"))


def test_nobody_is_served_in_the_clear(certificates: Path, plain_tls: Live) -> None:
    with pytest.raises(httpx.HTTPError):
        plain_tls.client.get("/health")
    with plain_tls.socket() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in connection.recv(100)
    assert answer(plain_tls, context(certificates)) == 200


def test_ciphers_keep_their_promise(certificates: Path, plain_tls: Live) -> None:
    trust = context(certificates)
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    with plain_tls.socket() as raw, trust.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
        chosen = connection.cipher()
        assert chosen is not None and chosen[0].startswith("ECDHE-") and ("GCM" in chosen[0] or "CHACHA" in chosen[0])
    trust.set_ciphers("AES128-SHA")
    with plain_tls.socket() as raw, pytest.raises(ssl.SSLError):
        trust.wrap_socket(raw, server_hostname="127.0.0.1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_1_is_refused(certificates: Path, plain_tls: Live) -> None:
    trust = context(certificates)
    trust.set_ciphers("ALL:@SECLEVEL=0")
    trust.minimum_version, trust.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with plain_tls.socket() as raw, pytest.raises(ssl.SSLError):
        trust.wrap_socket(raw, server_hostname="127.0.0.1")


def test_a_handshake_that_does_not_go_on_is_given_up(certificates: Path) -> None:
    with live_frontend(**flags(certificates), request_read_timeout=0.5) as live:
        process = psutil.Process(live.process.pid)
        before = process.num_fds()
        silent = [live.socket() for _ in range(20)]
        silent[0].sendall(b"\x16\x03\x01\x02\x00\x01")
        for connection in silent:
            connection.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        assert process.num_fds() < before + 5
        assert answer(live, context(certificates)) == 200
        for connection in silent:
            connection.close()


def test_certificates_of_clients(certificates: Path) -> None:
    authority = {"ssl_ca_certs": str(certificates / "ca.pem")}
    with live_frontend(**flags(certificates), **authority, ssl_cert_reqs=2) as live:
        assert answer(live, context(certificates, "friend")) == 200
        for client in (None, "stranger"):
            with pytest.raises(httpx.HTTPError):
                answer(live, context(certificates, client))
        assert answer(live, context(certificates, "friend")) == 200
    with live_frontend(**flags(certificates), **authority) as live:
        assert answer(live, context(certificates)) == 200
