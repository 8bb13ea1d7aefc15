"""A stand-in for `ratchet serve`: an OpenAI endpoint with scoped URLs whose store is a few dictionaries.

`World.model(system, user)` is the scripted model. Agents started by the tests speak HTTP to it, as to the real proxy.
"""

import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from collector.errors import NotFound, Unavailable

SCOPE = re.compile(r"^/e/([^/]+)(?:/with/([^/]+))?/v1/chat/completions$")

# Starts in a hundredth of a second, since the tests start hundreds: no import but json and a socket.
AGENT = """
import json, os, socket, sys
def post(url, body):
    host, _, path = url.removeprefix("http://").partition("/")
    data = json.dumps(body).encode()
    head = [f"POST /{path} HTTP/1.1", f"host: {host}", "connection: close", "content-type: application/json",
        f"content-length: {len(data)}", f"authorization: Bearer {os.environ['OPENAI_API_KEY']}", "", ""]
    with socket.create_connection(tuple(host.split(":")), timeout=20) as connection:
        connection.sendall("\\r\\n".join(head).encode() + data)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return json.loads(answer.partition(b"\\r\\n\\r\\n")[2])
task = json.loads(sys.stdin.readline())
reply = post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", {"model": "scripted", "messages": [
    {"role": "system", "content": "You are a helper."}, {"role": "user", "content": task["question"]}]})
print(reply["choices"][0]["message"]["content"])
"""


def script(folder: Path, text: str = AGENT, name: str = "agent.py") -> list[str]:
    """The command of an agent with this source."""
    path = folder / name
    path.write_text(text)
    return [sys.executable, "-S", "-E", str(path)]


class World:
    """The store and the client of it, as `collector.client.Client`, with the HTTP face that agents see."""

    def __init__(self, model: Callable[[str, str], str]) -> None:
        self.model = model
        self.slots_: dict[str, list[dict[str, Any]]] = {}
        self.live: dict[str, dict[int, float]] = {}
        self.candidates: dict[str, str] = {}
        self.spans_: list[dict[str, Any]] = []
        self.rewards: dict[str, dict[str, Any]] = {}
        self.events_: list[dict[str, Any]] = []
        self.promotions: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.queries = 0
        self.outage = 0  # how many further calls of the client fail
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        world = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/reward":
                    world.reward(body)
                    return self._answer(202, {"reward_id": "rw-1"})
                found = SCOPE.match(self.path)
                if found is None:
                    return self._answer(404, {"error": {"message": self.path}})
                world.keys.append(self.headers["authorization"])
                return self._answer(200, world.pinned(body, *found.groups()))

            def _answer(self, status: int, body: Mapping[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        return Handler

    def pinned(self, body: dict[str, Any], episode: str, pins: str | None) -> dict[str, Any]:
        """A call under `a@1,b@c-...`: of several, the slot counts whose first version is the prompt."""
        both = [pin.partition("@")[::2] for pin in (pins or "").split(",") if pin]
        prompt = body["messages"][0]["content"]
        own = [pin for pin in both if len(both) == 1 or self.slots_[pin[0]][0]["template"] == prompt]
        slot, version = own[0] if own else (None, None)
        return self.call(body, episode, slot, version)

    def call(self, body: dict[str, Any], episode: str, slot: str | None, version: str | None) -> dict[str, Any]:
        messages = [dict(message) for message in body["messages"]]
        if slot is not None and version is not None:
            messages[0]["content"] = self._template(slot, version)
        text = self.model(messages[0]["content"], messages[-1]["content"])
        output = {"role": "assistant", "content": text}
        with self.lock:
            number = len(self.spans_) + 1
            span = {"episode_id": episode, "slot": slot, "version": version, "start_ns": number, "end_ns": number}
            self.spans_.append({**span, "input_messages": messages, "output_messages": [output]})
        return {"choices": [{"message": output}]}

    def _template(self, slot: str, version: str) -> str:
        if version.startswith("c-"):
            return self.candidates[f"{slot}@{version}"]
        return str(self.version(slot, int(version))["template"])

    # collector.client.Client

    def _available(self) -> None:
        if self.outage > 0:
            self.outage -= 1
            raise Unavailable("the collector is away")

    def slots(self) -> list[dict[str, Any]]:
        return [{"slot": slot, "kind": "prompt", "live": self.live[slot]} for slot in self.slots_]

    def versions(self, slot: str) -> list[dict[str, Any]]:
        if slot not in self.slots_:
            raise NotFound(f"no slot {slot}")
        live = self.live[slot]
        return [{**version, "live": live.get(version["version"], 0.0)} for version in self.slots_[slot]]

    def version(self, slot: str, version: int) -> dict[str, Any]:
        return next(found for found in self.versions(slot) if found["version"] == version)

    def add_version(self, slot: str, **body: Any) -> dict[str, Any]:
        versions = self.slots_.setdefault(slot, [])
        same = [found for found in versions if found["template"] == body["template"]]
        if not same:
            digest = hashlib.sha256(body["template"].encode()).hexdigest()[:12]
            versions.append({"slot": slot, "version": len(versions) + 1, "hash": digest, **body})
            self.live.setdefault(slot, {1: 1.0})
            same = versions[-1:]
        return {"slot": slot, "version": same[0]["version"], "hash": same[0]["hash"]}

    def add_candidate(self, slot: str, template: str) -> str:
        self._available()
        candidate = "c-" + hashlib.sha256(template.encode()).hexdigest()[:12]
        self.candidates[f"{slot}@{candidate}"] = template
        return candidate

    def candidate(self, slot: str, candidate: str) -> str:
        return self.candidates[f"{slot}@{candidate}"]

    def promote(self, slot: str, version: int, traffic: float = 1.0, **why: Any) -> int:
        self.promotions.append({"slot": slot, "version": version, "traffic": traffic, **why})
        self.live[slot] = {version: traffic}
        return len(self.promotions) + 1

    def _row(self, episode: str) -> dict[str, Any]:
        steps = [span for span in self.spans_ if span["episode_id"] == episode]
        values = [reward["value"] for reward in self.rewards.values() if reward["episode_id"] == episode]
        reward = sum(values) if values else None
        return {"steps": steps, "reward": reward}

    def episode(self, episode_id: str) -> dict[str, Any]:
        row = self._row(episode_id)
        if not row["steps"] and row["reward"] is None:
            raise NotFound(f"no episode {episode_id}")
        steps = [{**step, "input_tokens": 5, "output_tokens": 1} for step in row["steps"]]
        return {"episode_id": episode_id, **row, "steps": steps, "rewards": []}

    def episodes(self, limit: int = 50, cursor: str | None = None, **filters: Any) -> dict[str, Any]:
        names = list(dict.fromkeys(span["episode_id"] for span in reversed(self.spans_)))
        rows = [{"episode_id": name, "reward": self._row(name)["reward"], "end_ns": 1} for name in names]
        least = filters.get("min_reward")
        if least is not None:
            rows = [row for row in rows if row["reward"] is not None and row["reward"] >= least]
        return {"episodes": rows[:limit], "next": None}

    def query(self, sql: str, limit: int = 10_000) -> dict[str, Any]:
        self._available()
        if "from jobs" in sql:
            jobs = [event for event in self.events_ if event["event"] == "job" and event["status"] == "cancelled"]
            return {"columns": ["job_id", "ts_ns"], "rows": [[job["job_id"], job["ts_ns"]] for job in jobs]}
        if "prompt_slot" in sql:
            return self._best()
        self.queries += 1
        columns = ["episode_id", "steps", "input_tokens", "output_tokens", "reward"]
        names = list(dict.fromkeys(span["episode_id"] for span in reversed(self.spans_)))
        rows = []
        for name in names[:limit]:
            row = self._row(name)
            rows.append([name, len(row["steps"]), 5 * len(row["steps"]), len(row["steps"]), row["reward"]])
        return {"columns": columns, "rows": rows, "truncated": False}

    def _best(self) -> dict[str, Any]:
        columns = ["episode_id", "prompt_slot", "input_messages", "output_messages", "reward"]
        rows = [{**span, **self._row(span["episode_id"]), "prompt_slot": span["slot"]} for span in self.spans_[::-1]]
        texts = [{**row, **{name: json.dumps(row[name]) for name in columns[2:4]}} for row in rows]
        found = [[row[name] for name in columns] for row in texts if len(row["steps"]) == 1 and row["reward"] == 1.0]
        return {"columns": columns, "rows": found}

    def reward(self, body: Any) -> Any:
        self._available()
        for one in body if isinstance(body, list) else [body]:
            self.rewards.setdefault(one.get("idempotency_key", str(len(self.rewards))), dict(one))
        return [{"reward_id": "rw"} for _ in body] if isinstance(body, list) else {"reward_id": "rw"}

    def events(self, events: list[dict[str, Any]]) -> None:
        self._available()
        self.events_.extend(events)

    def evaluations(self, job_id: str | None = None) -> list[dict[str, Any]]:
        found = [event for event in self.events_ if event["event"] == "evaluation"]
        return [event for event in found if job_id in (None, event["job_id"])]

    def jobs(self) -> list[dict[str, Any]]:
        latest = {event["job_id"]: event for event in self.events_ if event["event"] == "job"}
        return list(reversed(latest.values()))

    def job(self, job_id: str) -> dict[str, Any]:
        for job in self.jobs():
            if job["job_id"] == job_id:
                return job
        raise NotFound(f"no job {job_id}")

    def flush(self) -> dict[str, Any]:
        self._available()
        return {"loaded": 0, "pending": 0}
