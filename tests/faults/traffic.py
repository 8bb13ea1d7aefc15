"""Traffic that remembers what was acknowledged: calls answered whole, rewards and promotions taken."""

import threading
import time
from dataclasses import dataclass, field

import httpx

_TROUBLE = (httpx.HTTPError, OSError)


@dataclass
class Traffic:
    """A few clients that call, reward and go on, whatever dies. `url` is where the server is now, None while it is not
    there. `sent` counts calls, `spans`, `rewards` and `revisions` hold what was acknowledged."""

    url: str | None = None
    sent: int = 0
    spans: set[str] = field(default_factory=set)
    rewards: set[str] = field(default_factory=set)
    revisions: list[int] = field(default_factory=list)
    refused: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, clients: int = 3) -> None:
        """Begin; `stop` ends it."""
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End after the calls under way."""
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def promote(self, slot: str, version: int) -> None:
        """One promotion; its revision is remembered if it was answered."""
        try:
            answer = httpx.post(f"{self.url}/api/slots/{slot}/promote", json={"version": version}, timeout=20)
        except _TROUBLE:
            return
        if answer.status_code == 200:
            with self._lock:
                self.revisions.append(answer.json()["revision"])

    def compact(self) -> None:
        """Old days to the archive; whether it is answered does not matter."""
        try:
            httpx.post(f"{self.url}/api/store/compact", json={"days": 1}, timeout=20)
        except _TROUBLE:
            return

    def _run(self, client: int) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            url = self.url
            if url is None:
                time.sleep(0.01)
                continue
            with httpx.Client(timeout=10) as http:
                while self.url == url and not self._over.is_set() and self._once(http, url, client, number):
                    number += 1

    def _once(self, http: httpx.Client, url: str, client: int, number: int) -> bool:
        episode = f"c{client}-{number // 4}"
        body = {"model": "fake-model", "messages": [{"role": "user", "content": f"{client}:{number}"}]}
        try:
            with self._lock:
                self.sent += 1
            answer = http.post(f"{url}/e/{episode}/v1/chat/completions", json=body)
            if answer.status_code != 200:
                self.refused += 1
                return False
            span = answer.headers["x-ratchet-span"]
            with self._lock:
                self.spans.add(span)
            if number % 2:
                target = {"span_id": span} if number % 4 == 1 else {"episode_id": episode}
                key = {"idempotency_key": f"{client}:{number}"}
                taken = http.post(f"{url}/reward", json={**target, **key, "value": 1.0})
                if taken.status_code == 202:
                    with self._lock:
                        self.rewards.add(taken.json()["reward_id"])
        except _TROUBLE:
            time.sleep(0.01)
            return False
        return True
