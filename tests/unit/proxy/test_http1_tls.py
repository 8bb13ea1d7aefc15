"""The upstream client over TLS: certificates are verified, names too, and a cut is told from an end."""

import asyncio
import datetime
import os
import socket
import ssl
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy.http1 import Target
from proxy.http1_errors import ClosedEarly, ConnectFailed, ConnectTimeout, TlsFailed
from tests.unit.proxy.scripted import CHUNKED, OK, Peer, answering, call, on_loops, pair, saying, until


class Authority:
    """A certificate authority of one test session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = (
            self._builder(self.name, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int = 1) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=3))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    def server(self, *names: x509.GeneralName, days: int = 1) -> ssl.SSLContext:
        """A server's context with a certificate for `names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(x509.Name([]), key, days)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        path = self.folder / f"{certificate.serial_number}.pem"
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def client(self) -> ssl.SSLContext:
        """A client's context that trusts this authority, otherwise as the default one."""
        pem = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)


HERE = x509.IPAddress(ip_address("127.0.0.1"))
LOCALHOST = x509.DNSName("localhost")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    authority = Authority(tmp_path_factory.mktemp("tls"))
    return SimpleNamespace(authority=authority, trust=authority.client(), server=authority.server(HERE, LOCALHOST))


@on_loops
async def test_calls_over_tls_are_verified_answered_and_keep_their_connection(tls: SimpleNamespace) -> None:
    async with pair(answering(OK), tls.server, tls=tls.trust) as (client, server):
        for _ in range(3):
            assert (await call(client, server, b"x" * 300_000))[1] == b"hi"
        assert (server.accepted, client.idle) == (1, 1)


@on_loops
async def test_the_name_of_the_url_is_asked_for_and_verified(tls: SimpleNamespace) -> None:
    asked: list[str | None] = []
    context = tls.authority.server(LOCALHOST)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    async with pair(answering(OK), context, tls=tls.trust) as (client, server):
        target = Target.parse(f"https://localhost:{server.port}/v1")
        response = await client.request(b"GET", target, b"/", [])
        assert await response.read() == b"hi"
        with pytest.raises(TlsFailed, match="IP address mismatch"):
            await call(client, server)
        assert client.connections == 1
    assert asked[0] == "localhost"


@on_loops
@pytest.mark.parametrize(
    ("names", "days", "trusted", "why"),
    [
        ([HERE], 1, False, "unable to get local issuer certificate|self-signed"),
        ([x509.DNSName("elsewhere.test")], 1, True, "mismatch"),
        ([HERE], -1, True, "expired"),
    ],
)
async def test_a_certificate_that_is_not_to_be_trusted_ends_the_call_before_anything_is_sent(
    tls: SimpleNamespace, names: list[x509.GeneralName], days: int, trusted: bool, why: str
) -> None:
    context = tls.authority.server(*names, days=days)
    async with pair(answering(OK), context, tls=tls.trust if trusted else None) as (client, server):
        with pytest.raises(TlsFailed, match=why) as caught:
            await call(client, server)
        assert caught.value.bytes_seen == 0
        assert client.connections == 0


@on_loops
async def test_a_server_that_speaks_no_tls_is_told_from_one_that_is_not_there(tls: SimpleNamespace) -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.read(10)
        await peer.send(b"HTTP/1.1 400 Plain\r\n\r\n")

    async with pair(script, tls=tls.trust) as (client, server):
        with pytest.raises(TlsFailed):
            await client.request(b"GET", Target.parse(f"https://127.0.0.1:{server.port}"), b"/", [])
    with pytest.raises(ConnectFailed) as caught:
        await client.request(b"GET", Target.parse(f"https://127.0.0.1:{server.port}"), b"/", [])
    assert type(caught.value) is ConnectFailed


@on_loops
async def test_a_handshake_that_never_comes_is_a_timeout(tls: SimpleNamespace) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    async with pair(script, tls=tls.trust, connect_timeout=0.05) as (client, server):
        with pytest.raises(ConnectTimeout):
            await client.request(b"GET", Target.parse(f"https://127.0.0.1:{server.port}"), b"/", [])
        assert client.connections == 0


@on_loops
async def test_a_handshake_that_is_cancelled_leaks_nothing(tls: SimpleNamespace) -> None:
    async def script(peer: Peer) -> None:
        await peer.gone()

    async with pair(script, tls=tls.trust) as (client, server):
        target = Target.parse(f"https://127.0.0.1:{server.port}")
        for _ in range(3):
            task = asyncio.create_task(client.request(b"GET", target, b"/", []))
            accepted = server.accepted
            await until(lambda accepted=accepted: server.accepted > accepted)  # type: ignore[misc]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert client.connections == 0


@on_loops
async def test_over_tls_a_body_without_length_ends_with_a_goodbye_and_not_with_a_cut(tls: SimpleNamespace) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\npart")
        if peer.number:
            with socket.socket(fileno=os.dup(peer.writer.get_extra_info("socket").fileno())) as raw:
                raw.shutdown(socket.SHUT_RDWR)  # the connection is gone, TLS has not said so

    async with pair(script, tls.server, tls=tls.trust) as (client, server):
        assert (await call(client, server))[1] == b"part"
        with pytest.raises(ClosedEarly):
            await call(client, server)


@on_loops
async def test_a_stream_over_tls_is_relayed_as_it_comes_and_can_be_left(tls: SimpleNamespace) -> None:
    async with pair(saying(CHUNKED, b"2\r\nhi\r\n", stay=True), tls.server, tls=tls.trust) as (client, server):
        async with await client.request(b"POST", server.target, b"/", []) as response:
            assert await anext(aiter(response)) == b"hi"
        await until(lambda: client.connections == 0)


@on_loops
async def test_a_large_body_over_tls_waits_in_the_callers_bytes(tls: SimpleNamespace) -> None:
    size = 20 << 20
    async with pair(answering(OK), tls.server, tls=tls.trust) as (client, server):
        assert (await call(client, server, bytes(size)))[1] == b"hi"

    async def stuck(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    async with pair(stuck, tls.server, tls=tls.trust) as (client, server):
        task = asyncio.create_task(call(client, server, bytes(size)))
        await until(lambda: client.connections == 1)
        await asyncio.sleep(0.03)
        (connection,) = client._live
        assert connection._unsent is not None and len(connection._unsent) > size // 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@on_loops
async def test_without_a_context_of_its_own_the_client_uses_the_systems_trust_store(tls: SimpleNamespace) -> None:
    async with pair(answering(OK), tls.server) as (client, server):
        with pytest.raises(TlsFailed):
            await call(client, server)
        context = client._tls
        assert context is not None
        assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
