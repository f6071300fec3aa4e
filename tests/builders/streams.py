"""Clients that stream, hear everything with its time, and compare it with the stream that nobody disturbed."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

# Logarithms of probabilities from a prefill and from a decode step differ in the last bits of a float32.
LOGPROB_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Ask:
    """A call: its path and its body as canonical JSON, so that the same call is the same key."""

    path: str
    body: str

    @classmethod
    def of(cls, model: str, prompt: str, *, path: str = "/v1/completions", **options: Any) -> Ask:
        """A streamed completion, or a chat with `prompt` as the user's message."""
        said: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {}
        body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **options}
        return cls(path, json.dumps(body | (said or {"prompt": prompt}), sort_keys=True))


@dataclass
class Choice:
    """What one choice said. `tokens` and `logprobs` are there if the call asked for them."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    ends: int = 0


@dataclass
class Heard:
    """Everything that a client heard. `times` are the monotonic seconds at which tokens came.

    `status` 0: nobody answered, or the connection was lost; `fault` says what went wrong, "" if nothing did.
    """

    status: int = 0
    request_id: str = ""
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    hearth: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    opened_at: float = 0.0
    ended_at: float = 0.0
    done: bool = False
    refused: bool = False
    fault: str = ""

    def gap_s(self, after: float = 0.0, before: float = float("inf")) -> float:
        """The longest time between two tokens that reaches into this span of monotonic time."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((later - earlier for earlier, later in pairs if later > after and earlier < before), default=0.0)

    def differs(self, other: Heard) -> str:
        """In what this differs from `other`, in one sentence; "" if they say the same."""
        if self.fault or other.fault:
            return self.fault or other.fault
        if self.choices.keys() != other.choices.keys():
            return f"choices {sorted(self.choices)} instead of {sorted(other.choices)}"
        for index, mine in self.choices.items():
            theirs = other.choices[index]
            if mine.text != theirs.text:
                return f"choice {index}: {first_difference(mine.text, theirs.text)}"
            if (mine.finish_reason, mine.ends) != (theirs.finish_reason, theirs.ends):
                return (
                    f"choice {index} ended {mine.ends} times with {mine.finish_reason!r}, not {theirs.finish_reason!r}"
                )
            if mine.tokens != theirs.tokens:
                return f"choice {index}: tokens differ: {len(mine.tokens)} instead of {len(theirs.tokens)}"
            for at, (a, b) in enumerate(zip(mine.logprobs, theirs.logprobs, strict=True)):
                if abs(a - b) > LOGPROB_TOLERANCE:
                    return f"choice {index}: log probability {at} is {a}, not {b}"
        counts = ("prompt_tokens", "completion_tokens")
        if any(self.usage.get(count) != other.usage.get(count) for count in counts):
            return f"usage {self.usage} instead of {other.usage}"
        return ""


def first_difference(text: str, expected: str) -> str:
    """Where two texts part."""
    at = next(
        (n for n, (a, b) in enumerate(zip(text, expected, strict=False)) if a != b), min(len(text), len(expected))
    )
    return (
        f"text of {len(text)} characters instead of {len(expected)}, "
        f"different from character {at} on: {text[at : at + 24]!r} instead of {expected[at : at + 24]!r}"
    )


class Stream:
    """A client on a thread of its own. `heard` grows while it streams; `wait()` for the end."""

    def __init__(self, url: str, ask: Ask, *, timeout_s: float = 300.0, info: bool = True) -> None:
        self.ask = ask
        self.url = url
        self.heard = Heard()
        self._timeout_s = timeout_s
        self._info = info
        self._left = False
        self._connection: http.client.HTTPConnection | None = None
        self._more = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.heard.ended_at > 0

    def until_events(self, events: int, timeout_s: float = 120.0) -> None:
        """Wait until so many events with tokens have come (or the stream has ended)."""
        with self._more:
            came = self._more.wait_for(lambda: len(self.heard.times) >= events or self.ended, timeout_s)
        assert came, f"{len(self.heard.times)} events came in {timeout_s:.0f} s, not {events}"

    def wait(self, timeout_s: float | None = None) -> Heard:
        """What was heard, all of it."""
        self._thread.join(timeout_s or self._timeout_s + 10)
        assert not self._thread.is_alive(), f"a stream has not ended: {len(self.heard.times)} events came"
        return self.heard

    def leave(self) -> None:
        """Close the connection now, as a client does that has lost interest."""
        self._left = True
        connection = self._connection
        sock = None if connection is None else connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)
        self._thread.join(10)

    def _run(self) -> None:
        try:
            self._stream()
        except (OSError, http.client.HTTPException) as error:
            if not self._left:
                self.heard.fault = f"the connection was lost: {type(error).__name__} {error}".rstrip()
        finally:
            with self._more:
                self.heard.ended_at = time.monotonic()
                self._more.notify_all()
            if self._connection is not None:
                self._connection.close()

    def _stream(self) -> None:
        heard = self.heard
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=self._timeout_s)
        headers = {"Content-Type": "application/json"} | ({"x-hearth-info": "true"} if self._info else {})
        heard.opened_at = time.monotonic()
        self._connection.request("POST", self.ask.path, self.ask.body, headers)
        answer = self._connection.getresponse()
        heard.status = answer.status
        heard.request_id = answer.getheader("x-hearth-request-id") or ""
        if answer.status != 200:
            heard.refused = True
            heard.fault = f"{answer.status} {answer.read().decode(errors='replace')}"
            return
        for line in answer:
            if line.startswith(b"data: [DONE]"):
                heard.done = True
            elif line.startswith(b"data: "):
                self._event(json.loads(line[6:]))
        if not heard.done and not heard.fault and not self._left:
            heard.fault = f"the stream ended without [DONE] after {len(heard.times)} events"

    def _event(self, event: dict[str, Any]) -> None:
        heard = self.heard
        if "error" in event:
            heard.fault = f"error in the stream: {event['error'].get('code')}: {event['error'].get('message')}"
            return
        heard.usage = event.get("usage") or heard.usage
        heard.hearth = event.get("hearth") or heard.hearth
        came = False
        for part in event["choices"]:
            choice = heard.choices.setdefault(part["index"], Choice())
            text = part["text"] if "text" in part else part["delta"].get("content") or ""
            choice.text += text
            logprobs = part.get("logprobs")
            if logprobs and "content" in logprobs:
                choice.tokens += [one["token"] for one in logprobs["content"]]
                choice.logprobs += [one["logprob"] for one in logprobs["content"]]
            elif logprobs:
                choice.tokens += logprobs["tokens"]
                choice.logprobs += logprobs["token_logprobs"]
            if part.get("finish_reason"):
                choice.finish_reason = part["finish_reason"]
                choice.ends += 1
            came = came or bool(text or logprobs)
        if came:
            with self._more:
                heard.times.append(time.monotonic())
                self._more.notify_all()


class Twins:
    """What each call says when nobody disturbs it, asked once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._heard: dict[Ask, Heard] = {}

    def learn(self, asks: list[Ask]) -> None:
        """Ask these now, all at once, each of them once."""
        streams = {ask: Stream(self._url, ask, info=False) for ask in dict.fromkeys(asks) if ask not in self._heard}
        for ask, stream in streams.items():
            heard = stream.wait()
            assert not heard.fault, heard.fault
            self._heard[ask] = heard

    def of(self, ask: Ask) -> Heard:
        """The undisturbed stream of a call."""
        if ask not in self._heard:
            self.learn([ask])
        return self._heard[ask]
