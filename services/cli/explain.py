"""`hearth explain`: why a model was loaded where it was, what that was to take and what it took; where a request's time
went."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from services.cli.client import Client, ClientError, ExplainedRequest, RequestExplanation, run
from services.cli.ps import plain_table
from shared.contracts.generation import Ledger
from shared.contracts.placement import CandidateView, DecisionView, Explanation, Parts
from shared.sizes import duration, size

INDENT: Final = 2
PIPED_COLUMNS: Final = 160  # piped, rich would fold everything to 80 columns
CHOSEN: Final = "▸"
# So many places that were refused for one reason are named.
NAMED: Final = 5
# Where a load found the checkpoint.
TIERS: Final = {"dram": "DRAM", "ssd": "SSD", "peer": "a peer", "remote": "the source", "accelerator": "accelerator"}
# An estimate that is off by less is right.
RIGHT: Final = 0.005
NOTHING: Final = ("wait", "impossible")
FEW: Final = 20  # loads of which a 95th percentile says nothing
ROOM: Final = ("evict", "move")


def explanation(found: Explanation, about: str) -> RenderableType:
    """All that was found, latest first, readable at 80 columns. `about` names what was asked for."""
    parts: list[RenderableType] = []
    if found.doing:
        parts.append(Text.assemble(("now: ", "yellow"), found.doing))
    if found.waiting and not any(one.reason == found.waiting for one in found.decisions[:1]):
        parts.append(Text.assemble(("nothing is placed now: ", "yellow"), found.waiting))
    if not found.decisions:
        parts.append(Text(f"no decision about {about} is remembered", style="dim"))
    for one in found.decisions:
        parts += [decision(one), ""]
    if found.median_error is not None:
        parts.append(Text(_accuracy(found, percent(found.median_error)), style="dim"))
    return Group(*parts)


def _accuracy(found: Explanation, median: str) -> str:
    """How far the last estimates were off."""
    if found.loads == 1:
        return f"the only load so far was estimated with an error of {median}"
    which = f"the last {found.loads} estimates" if found.loads else "estimates"
    worst = ""
    if found.p95_error is not None and found.loads >= FEW:
        worst = f", 95 % by at most {percent(found.p95_error)}"
    return f"{which} were off by {median} at the median{worst}"


# -- a decision -------------------------------------------------------------------------------------------------------


def decision(one: DecisionView) -> RenderableType:
    """A decision: what was decided, the estimates, what it took, how room was made, who was refused."""
    possible = [place for place in one.candidates if place.estimate is not None]
    below: list[RenderableType] = [Text(words, style=style) for words, style in _facts(one) if words]
    if possible:
        below += [_estimates(one, possible)]
    rooms = [place for place in possible if place.room]
    if rooms:
        below += [*(_noted(f"room on {_workers(place)}", place.room) for place in rooms)]
    if one.failure is not None:
        below += [Text(f"the load failed: {one.failure.message}", style="red")]
    refused = [place for place in one.candidates if place.estimate is None]
    if refused or one.more:
        below += [*_refusals(refused), *_more(one, bool(possible))]
    return Group(_headline(one), *map(_indented, below))


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, INDENT), expand=False)


def _headline(one: DecisionView) -> Text:
    ago = f"{duration(one.ago_s)} ago"
    if one.outcome in NOTHING:
        words = "waits" if one.outcome == "wait" else "cannot be placed"
        when = f" for {duration(one.ago_s)}, looked at {one.times} times" if one.times > 1 else f" · {ago}"
        return Text.assemble((one.deployment, "bold"), " ", (words, "yellow"), (when, "dim"))
    chosen = one.candidates[0] if one.candidates else None
    where = f" → {_workers(chosen)}" if chosen else ""
    verb = {"place": "loaded", "evict": "loaded in place of others", "move": "loaded after making room"}
    what = verb.get(one.outcome, one.outcome)
    return Text.assemble((one.deployment, "bold"), f"{where} ", (what, "green"), (f" · {ago}", "dim"))


def _facts(one: DecisionView) -> Iterable[tuple[str, str]]:
    """Lines below the headline, with their styles."""
    yield one.reason, ""
    took = [f"decided in {one.decide_ms:.1f} ms"] if one.decide_ms else []
    replica = [f"replica {one.replica_id}"] if one.replica_id else ["room is being made"] * (one.outcome in ROOM)
    yield " · ".join(replica + took), "dim"


def _estimates(one: DecisionView, possible: Sequence[CandidateView]) -> Table:
    table = plain_table(
        "", "", "worker", "server", "from", "wait", "move", "attach", "room", "total",
        right=("wait", "move", "attach", "room", "total"),
    )  # fmt: skip
    table.title = None
    table.padding = (0, 1, 0, 0)
    for place in possible:
        assert place.estimate is not None
        chosen = place is one.candidates[0] and one.outcome not in NOTHING
        table.add_row(
            CHOSEN if chosen else "",
            _workers(place),
            place.server_id,
            TIERS.get(place.tier, place.tier),
            *_seconds(place.estimate),
            seconds(total_s(place.estimate)),
            style="green" if chosen else None,
        )
        if chosen and one.actual is not None and one.actual_s is not None:
            off = error_words(total_s(place.estimate), one.actual_s)
            table.add_row(
                "", Text("it took"), Text(off), "", *_seconds(one.actual), seconds(one.actual_s), style="bold"
            )
    return table


def _refusals(refused: Sequence[CandidateView]) -> Iterable[Text]:
    """Those that were refused, by reason, the most frequent one first."""
    reasons: dict[str, list[str]] = {}
    for place in refused:
        reasons.setdefault(place.refused, []).append(_workers(place))
    for reason, names in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield _noted(f"not {', '.join(names[:NAMED])}{more}", reason)


def _more(one: DecisionView, possible: bool) -> list[Text]:
    if not one.more:
        return []
    workers = "1 other worker" if one.more == 1 else f"{one.more} other workers"
    return [Text(f"{workers} could not have been better" if possible else f"{workers} likewise", style="dim")]


def _noted(name: str, words: str) -> Text:
    return Text.assemble((f"{name}: ", "dim"), words)


def _workers(place: CandidateView) -> str:
    return " + ".join(place.worker_ids)


def _seconds(parts: Parts) -> tuple[str, str, str, str]:
    return seconds(parts.wait_s), seconds(parts.move_s), seconds(parts.attach_s), seconds(parts.room_s)


def total_s(parts: Parts) -> float:
    """The seconds of all parts."""
    return parts.wait_s + parts.move_s + parts.attach_s + parts.room_s


def seconds(value: float) -> str:
    """Seconds that can be compared down a column: "0.043 s", "12.500 s", "310 s"; "–" for none."""
    if value <= 0:
        return "–"
    return f"{value:.3f} s" if value < 100 else f"{value:.0f} s"


def percent(part: float | None) -> str:
    """`4 %`, `0.4 %`."""
    part = 100 * (part or 0.0)
    return f"{part:.0f} %" if part >= 1 or part == 0 else f"{part:.1g} %"


def error_words(estimate_s: float, actual_s: float) -> str:
    """How the estimate compares with what it took: "12 % more"."""
    if actual_s <= 0 or abs(actual_s - estimate_s) / actual_s < RIGHT:
        return "as said"
    if estimate_s <= 0:
        return "more"
    off = actual_s / estimate_s - 1
    return f"{percent(abs(off))} {'more' if off > 0 else 'less'}"


# -- a request --------------------------------------------------------------------------------------------------------


def request_explanation(found: RequestExplanation) -> RenderableType:
    """A request: what became of it, where its time went, and the decisions behind it."""
    one = found.request
    parts: list[RenderableType] = [_request_headline(one), *map(_indented, _story(one))]
    if one.ledger is not None:
        parts += ["", _indented(_ledger(one.ledger))]
    if found.explanation is None:
        parts += ["", Text(f"the decisions are not known: {found.error}", style="yellow")]
    elif one.state in ("queued", "interrupted"):
        parts += ["", Text(f"it runs nowhere; decisions about {one.deployment}:", style="dim")]
        parts.append(explanation(found.explanation, one.deployment))
    elif found.explanation.decisions:
        was = "replica" if len(found.explanation.decisions) == 1 else "replicas"
        parts += ["", Text(f"how its {was} came there:", style="dim")]
        parts.append(explanation(found.explanation, "its replica"))
    else:
        parts += ["", Text("the decision that loaded its replica is not remembered any more", style="dim")]
    return Group(*parts)


def _request_headline(one: ExplainedRequest) -> Text:
    if one.state == "ended":
        good = not one.error and one.reason in ("stop", "length")
        how = Text(f"ended ({one.reason})", style="green" if good else "red")
        when = f"{duration(one.ended_ago_s or 0.0)} ago"
    else:
        how = Text(one.state, style="green" if one.state == "streaming" else "yellow")
        when = f"for {duration(one.age_s)}"
    return Text.assemble("request ", (one.request_id, "bold"), " of ", (one.deployment, "bold"), " ", how, f" {when}")


def _story(one: ExplainedRequest) -> Iterable[Text]:
    if one.error:
        yield Text(one.error, style="red")
    tokens = f"{one.completion_tokens} tokens" if one.completion_tokens != 1 else "1 token"
    if one.prompt_tokens is not None:
        tokens = f"{one.prompt_tokens} tokens of prompt, {tokens} of answer"
    first = f", the first after {duration(one.ttft_s)}" if one.ttft_s is not None else ""
    took_s = one.age_s - (one.ended_ago_s or 0.0)
    if one.state == "ended" or one.completion_tokens:
        yield Text(f"{tokens}{first}" + (f", all after {duration(took_s)}" if one.state == "ended" else ""))
    if one.places:
        yield Text("at " + ", then ".join(f"{place.worker_id} ({place.replica_id})" for place in one.places))


def _ledger(ledger: Ledger) -> Table:
    """Where the time went; what lies inside the queue's time is put under it."""
    table = plain_table("", "where the time went", "took", "", right=("took",))
    table.title = None
    inside = ledger.queue_s if ledger.cold else 0.0
    known = ledger.decision_s + ledger.import_s + ledger.read_s + ledger.attach_s
    moved = " → ".join(
        f"{size(count)} {name}"
        for count, name in (
            (ledger.remote_bytes, "from the source"), (ledger.ssd_bytes, "from SSD"), (ledger.dram_bytes, "from DRAM"),
        )
        if count
    )  # fmt: skip
    tier = TIERS.get(ledger.tier, ledger.tier)
    rows: list[tuple[str, float, str]] = [
        ("in the queue", ledger.queue_s, f"a cold start from {tier}" if ledger.cold else "the model was loaded"),
        *(
            (
                ("  until it was decided", ledger.decision_s, ""),
                ("  source → SSD", ledger.import_s, ""),
                ("  → DRAM", ledger.read_s, moved),
                ("  attached", ledger.attach_s, ""),
                ("  other waiting", max(0.0, inside - known), "for room, the load queue, the way to the worker"),
            )
            if ledger.cold
            else ()
        ),
        ("prefill", ledger.prefill_s, ""),
        ("decode", ledger.decode_s, ""),
    ]
    for name, value, words in rows:
        if value > 0 or not name.startswith(" "):
            table.add_row(name, seconds(value), Text(words, style="dim"))
    if ledger.migrations or ledger.recoveries:
        moves = f"{_count(ledger.migrations, 'migration')} in {_count(ledger.rounds, 'round')}"
        lost = f"resumed {_count(ledger.recoveries, 'time')}"
        notes = [moves] * (ledger.migrations > 0) + [lost] * (ledger.recoveries > 0)
        table.add_row("longest pause", seconds(ledger.pause_s), ", ".join(notes))
    return table


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# -- the verb ---------------------------------------------------------------------------------------------------------


def explain(options: argparse.Namespace) -> int:
    """Run `hearth explain`."""

    async def work() -> int:
        async with Client(options.url) as client:
            found, shown = await _found(client, options.what, options.last)
        if options.json:
            print(msgspec.json.encode(found).decode())
        else:
            console = Console()
            (console if console.is_terminal else Console(width=PIPED_COLUMNS)).print(shown)
        return 0

    return run(work())


async def _found(client: Client, what: str | None, last: int) -> tuple[msgspec.Struct, RenderableType]:
    """What is meant, a deployment before a request, and how it is shown. Raises `ClientError`."""
    if what is None:
        everything = await client.explain("", last)
        return everything, explanation(everything, "anything")
    names = {record.spec.name for record in (await client.cluster()).deployments}
    if what in names:
        found = await client.explain(what, last)
        return found, explanation(found, what)
    try:
        request = await client.explain_request(what, last)
    except ClientError as error:
        if error.code != "not_found":
            raise
        raise ClientError(f"No deployment is called {what!r}. {error}", error.code) from error
    return request, request_explanation(request)
