"""OpenTelemetry's usual port beside our own."""

import logging
import socket
from pathlib import Path

import httpx
import pytest

from collector.errors import Conflict
from collector.settings import Server
from proxy import supervisor
from tests.fake_upstream import FakeUpstream
from tests.served import served
from tests.unit.proxy.test_otlp_route import PROTOBUF, SPAN, traces


def test_auto_takes_the_port_where_it_is_free_and_says_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(supervisor, "OTLP_PORT", taken.getsockname()[1])
        with caplog.at_level(logging.WARNING):
            assert supervisor.also_listen(Server()) is None
        assert "is taken: OTLP is received on port 4000 only" in caplog.text
        with pytest.raises(Conflict):
            supervisor.also_listen(Server(otlp_port=taken.getsockname()[1]))
    found = supervisor.also_listen(Server())
    assert found is not None
    assert found.getsockname()[1] == supervisor.OTLP_PORT
    found.close()


def test_where_it_is_off_or_our_own_port_is_any_there_is_none() -> None:
    assert supervisor.also_listen(Server(otlp_port=None)) is None
    assert supervisor.also_listen(Server(port=0)) is None


def test_what_is_sent_to_the_other_port_is_stored(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = tmp_path / "ratchet.yaml"
    config.write_text(f"server:\n  otlp_port: {port}\n")
    with FakeUpstream() as upstream, served(tmp_path / "data", upstream.url, config=config) as server:
        for base in (f"http://127.0.0.1:{port}", server.url):
            answer = httpx.post(f"{base}/v1/traces", content=traces(SPAN), headers=PROTOBUF, trust_env=False)
            assert answer.status_code == 200
        server.client.flush()
        assert server.client.query("SELECT span_id, source FROM spans_v")["rows"] == [[SPAN.hex(), "otlp"]]
