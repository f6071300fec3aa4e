"""`hearth chat`: a conversation with a deployment, streamed."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from typing import Any, Final

from services.cli.client import Client, ClientError

HELP: Final = "/reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class Conversation:
    """The messages so far. A question without a whole answer is taken back, so that roles keep alternating."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._messages = [{"role": "system", "content": self._options.system}] if self._options.system else []

    def body(self, question: str) -> dict[str, Any]:
        """The request that asks this."""
        asked = {
            "max_tokens": self._options.max_tokens,
            "temperature": self._options.temperature,
            "seed": self._options.seed,
        }
        return {
            "model": self._options.name,
            "messages": [*self._messages, {"role": "user", "content": question}],
            **{name: value for name, value in asked.items() if value is not None},
        }

    def answered(self, question: str, answer: str) -> None:
        """Keep a question and its answer (also one that was stopped half-way, if there is any)."""
        if answer:
            self._messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Status:
    """A transient line on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._shown = False

    def show(self, text: str) -> None:
        """Show this until something else comes."""
        if self._terminal and text:
            sys.stdout.write(f"\r\x1b[K\x1b[2m({text})\x1b[0m")
            sys.stdout.flush()
            self._shown = True

    def clear(self) -> None:
        """Remove it."""
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            self._shown = False


async def _answer(client: Client, body: dict[str, Any], said: list[str]) -> None:
    """Stream one answer to standard output; its pieces are appended to `said`."""
    status = Status()
    reason = ""
    try:
        async for kind, text in client.chat(body):
            if kind == "comment":
                if not said:
                    status.show(text)
            elif kind == "text":
                status.clear()
                said.append(text)
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                reason = text
    finally:
        status.clear()
    print(" […]" if reason == "length" else "", flush=True)


def chat(options: argparse.Namespace) -> int:
    """Run `hearth chat`: questions from the terminal, or one per line from a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        print(f"Talking to {options.name} at {options.url}. {HELP}")
    conversation = Conversation(options)
    client = Client(options.url)
    # One loop for all answers. The questions are read outside of it, so that Ctrl-C means what it says in both places.
    with asyncio.Runner() as runner:
        runner.run(client.__aenter__())
        try:
            return _talk(options, conversation, client, runner, interactive)
        finally:
            runner.run(client.__aexit__(None, None, None))


def _talk(
    options: argparse.Namespace, conversation: Conversation, client: Client, runner: asyncio.Runner, interactive: bool
) -> int:
    code = 0
    while True:
        try:
            question = (input("> ") if interactive else input()).strip()
        except EOFError:
            if interactive:
                print()
            return code
        except KeyboardInterrupt:
            print()
            return 130
        if question == "/exit":
            return code
        if question == "/reset":
            conversation.reset()
            continue
        if question == "/help":
            print(HELP)
            continue
        if not question:
            continue
        said: list[str] = []
        try:
            runner.run(_answer(client, conversation.body(question), said))
        except KeyboardInterrupt:
            print("\n(stopped)")
            if not interactive:
                return 130
        except ClientError as error:
            print(f"{chr(10) if said else ''}hearth: {error}", file=sys.stderr)
            code = 1
            if not interactive:
                return code
        conversation.answered(question, "".join(said))
