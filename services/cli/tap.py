"""`hearth tap`: the traffic on the bus, decoded. What belongs to users (prompts, texts, tokens) shows as sizes only."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import re
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final

from shared import log
from shared.bus import Bus
from shared.codec import CodecError, decode_any
from shared.errors import HearthError
from shared.subjects import CONVERSATIONS, Endpoint

# Keys under which the contracts carry what users wrote or read.
USER_DATA: Final = frozenset(
    {"text", "echo_text", "content", "messages", "token_ids", "prompt", "logprobs", "stop", "logit_bias"}
)
REPLIES_REMEMBERED: Final = 4096
QUEUE_LIMIT: Final = 10_000


def veil(value: Any, *, user: bool = False) -> Any:
    """The value with user data replaced by its size."""
    if user:
        if isinstance(value, str):
            return f"<{len(value)} characters>"
        if isinstance(value, list | tuple):
            return f"<{len(value)} items>"
        if isinstance(value, dict) and "type" in value:  # a prompt: its kind may be seen
            return {key: part if key == "type" else veil(part, user=True) for key, part in value.items()}
        return None if value is None else "<hidden>"
    if isinstance(value, dict):
        return {key: veil(part, user=str(key) in USER_DATA) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [veil(part) for part in value]
    return value


class Decoder:
    """Knows the subjects, and which reply belongs to which call."""

    def __init__(self, prefix: str, *, payloads: bool) -> None:
        self._root = f"{prefix}." if prefix else ""
        self._payloads = payloads
        self._known = [
            (
                re.compile("[^.]+".join(re.escape(part) for part in re.split(r"\{[a-z_]+\}", talk.template)) + r"\Z"),
                talk,
            )
            for talk in CONVERSATIONS
        ]
        self._replies: OrderedDict[str, str] = OrderedDict()

    def decode(self, subject: str, data: bytes, reply: str) -> dict[str, Any] | None:
        """What to show of a message; None for a reply to something that was not seen (or is not ours)."""
        answered = self._replies.pop(subject, None)
        if subject.startswith("_INBOX.") and answered is None:
            return None
        short = subject.removeprefix(self._root)
        talk = next((talk for pattern, talk in self._known if pattern.match(short)), None)
        if reply and isinstance(talk, Endpoint):
            self._replies[reply] = short
            while len(self._replies) > REPLIES_REMEMBERED:
                self._replies.popitem(last=False)
        shown: dict[str, Any] = {"subject": answered or short}
        if answered:
            shown["reply"] = True
        shown["bytes"] = len(data)
        if talk is None and answered is None:
            return shown | {"unknown": True}
        try:
            message = decode_any(data)
        except CodecError as error:
            return shown | {"malformed": str(error)}
        return shown | {"message": message if self._payloads else veil(message)}


def render(shown: dict[str, Any], at_s: float) -> str:
    """One line: the time, the subject, the message's type and its fields."""
    clock = datetime.datetime.fromtimestamp(at_s).strftime("%H:%M:%S.%f")[:-3]
    arrow = "←" if shown.get("reply") else "→"
    head = f"{clock} {arrow} {shown['subject']}"
    if "message" not in shown:
        return f"{head}  {shown['bytes']} bytes {shown.get('malformed', '')}".rstrip()
    message = shown["message"]
    if not isinstance(message, dict):
        return f"{head}  {json.dumps(message, ensure_ascii=False, default=repr)}"
    fields = " ".join(
        f"{key}={json.dumps(value, ensure_ascii=False, default=repr, separators=(',', ':'))}"
        for key, value in message.items()
        if key != "type"
    )
    return f"{head}  {message.get('type', '')} {fields}".rstrip()


def nats_url_of(data_dir: Path) -> str:
    """HEARTH_NATS_URL, else the server of the `hearth up` that runs on this data directory, else NATS's own default."""
    if url := os.environ.get("HEARTH_NATS_URL"):
        return url
    try:
        return str(json.loads((data_dir / "up.json").read_text())["nats_url"])
    except (OSError, ValueError, KeyError, TypeError):
        return "nats://127.0.0.1:4222"


def tap(options: argparse.Namespace) -> int:
    """Run `hearth tap`, until Ctrl-C."""
    log.configure("tap", "tap", level="warning", form="console")
    try:
        return asyncio.run(_tap(options, nats_url_of(options.data_dir), os.environ.get("HEARTH_PREFIX", "")))
    except HearthError as error:
        print(f"hearth tap: {error} Is `hearth up` running, with this --data-dir?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


async def _tap(options: argparse.Namespace, url: str, prefix: str) -> int:
    decoder = Decoder(prefix, payloads=options.payloads)
    waiting: asyncio.Queue[tuple[float, str, bytes, str]] = asyncio.Queue(QUEUE_LIMIT)
    lost = 0

    def arrived(subject: str, data: bytes, reply: str) -> None:
        nonlocal lost
        try:
            waiting.put_nowait((time.time(), subject, data, reply))
        except asyncio.QueueFull:  # the terminal is slower than the cluster
            lost += 1

    root = f"{prefix}." if prefix else ""
    everything = options.subjects == [">"]
    subjects = [f"{root}v1.>", "_INBOX.>"] if everything else [*(root + one for one in options.subjects), "_INBOX.>"]
    async with Bus.connect(url, name="tap", prefix=prefix, wait_s=5.0) as bus:
        for subject in subjects:
            await bus.listen(subject, arrived)
        await bus.flush()
        print(f"listening at {url}; Ctrl-C ends it", file=sys.stderr, flush=True)
        while True:
            at_s, subject, data, reply = await waiting.get()
            shown = decoder.decode(subject, data, reply)
            if lost:
                print(f"{lost} messages were not shown", file=sys.stderr, flush=True)
                lost = 0
            if shown is None:
                continue
            if options.json:
                print(json.dumps({"at_s": at_s, **shown}, ensure_ascii=False, default=repr), flush=True)
            else:
                print(render(shown, at_s), flush=True)
