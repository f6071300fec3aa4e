"""`hearth up`: the whole cluster on one machine, as child processes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.cli import logview, servers
from services.cli.children import Child
from services.cli.cluster import ChildPlan, DataDir, Plan, UpError, Wish, check_port, make
from shared.sizes import size

if TYPE_CHECKING:
    from shared.contracts.records import DeploymentSpec

INFRASTRUCTURE_S: Final = 60.0
POLL_S: Final = 0.1
STILL_WAITING_S: Final = 20.0
# What a drained child may take beyond the drain itself.
GRACE_S: Final = 5.0
# Those who take requests stop first; what everybody stands on stops last.
STOP_ORDER: Final = (("gateway",), ("worker",), ("store",), ("scheduler",), ("nats", "redis"))
DEMO_DIR: Final = Path(__file__).resolve().parent.parent.parent / "examples" / "demo-model" / "model"
QUESTION: Final = "Tell me a story."


class Screen:
    """Standard output: log lines, our own words, the banner. A reader that left must not end the cluster."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._broken = False

    def show(self, plan: ChildPlan, text: str) -> None:
        """A line that a child printed."""
        line = logview.read(text, time.time())
        if logview.wanted(line, plain=plan.plain, verbose=self._verbose):
            self.print(logview.render(plan.name, line, colour=self._colour))

    def tell(self, name: str, text: str, level: int = logview.LEVELS["warning"]) -> None:
        """Our own words about a child, or (name "hearth") about the cluster."""
        self.print(logview.render(name, logview.Line(time.time(), level, text, {}), colour=self._colour))

    def say(self, text: str) -> None:
        """Our own words, nothing grave."""
        self.tell("hearth", text, logview.LEVELS["info"])

    def print(self, text: str) -> None:
        """Plain text."""
        if not self._broken:
            try:
                print(text, flush=True)
            except (OSError, ValueError):
                self._broken = True


class Cluster:
    """One life of the local cluster."""

    def __init__(self, plan: Plan, data: DataDir, screen: Screen, *, demo: bool) -> None:
        self._plan = plan
        self._data = data
        self._screen = screen
        self._demo = demo
        self._children: list[Child] = []
        self._stop = asyncio.Event()
        self._forced = False
        self._failure: str | None = None
        self._began_s = time.monotonic()

    async def run(self) -> int:
        """Until Ctrl-C, SIGTERM, or a child that cannot be kept running; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._asked_to_stop)
        try:
            async with asyncio.TaskGroup() as tasks:
                opening = tasks.create_task(self._open(tasks))
                await self._stop.wait()
                opening.cancel()
                await self._drain()
        finally:
            (self._data.path / "up.json").unlink(missing_ok=True)
            shutil.rmtree(self._plan.shm_dir, ignore_errors=True)
        if self._failure is not None:
            self._screen.tell("hearth", self._failure, logview.LEVELS["error"])
            return 1
        self._screen.say("stopped")
        return 0

    def _asked_to_stop(self) -> None:
        if not self._stop.is_set():
            self._screen.print("")
            self._screen.say("draining; Ctrl-C again ends everything at once")
            self._stop.set()
        elif not self._forced:
            self._forced = True
            for child in self._children:
                child.kill()

    # -- starting ------------------------------------------------------------------------------------------------

    async def _open(self, tasks: asyncio.TaskGroup) -> None:
        try:
            self._start(tasks, self._plan.infrastructure)
            await self._until_infrastructure_answers()
            self._start(tasks, self._plan.services)
            await self._until_ready()
            if self._demo:
                await self._deploy_demo()
            await self._banner()
        except UpError as error:
            self._failure = str(error)
            self._stop.set()

    def _start(self, tasks: asyncio.TaskGroup, plans: list[ChildPlan]) -> None:
        for plan in plans:
            child = Child(
                plan, self._plan.logs, show=self._screen.show, tell=self._screen.tell, started=self._write_state
            )
            self._children.append(child)
            tasks.create_task(self._keep(child))

    async def _keep(self, child: Child) -> None:
        reason = await child.run()
        if reason is not None:
            self._failure = self._failure or reason
            self._stop.set()

    def _write_state(self) -> None:
        state = {
            "pid": os.getpid(),
            "url": self._plan.url,
            "nats_url": self._plan.nats_url,
            "redis_url": self._plan.redis_url,
            "children": {child.plan.name: child.pid for child in self._children},
        }
        path = self._data.path / "up.json"
        with contextlib.suppress(OSError):
            path.with_suffix(".new").write_text(json.dumps(state, indent=2))
            path.with_suffix(".new").replace(path)

    async def _until_infrastructure_answers(self) -> None:
        deadline_s = time.monotonic() + INFRASTRUCTURE_S
        for name, variable, url, answers in (
            ("NATS", "HEARTH_NATS_URL", self._plan.nats_url, servers.nats_answers),
            ("Redis", "HEARTH_REDIS_URL", self._plan.redis_url, servers.redis_answers),
        ):
            # Our own is waited for; one that should be running already gets a few seconds.
            own = any(plan.kind == name.lower() for plan in self._plan.infrastructure)
            until_s = deadline_s if own else time.monotonic() + 5.0
            while not await asyncio.to_thread(answers, url):
                if time.monotonic() > until_s:
                    where = f"its log: {self._plan.logs / name.lower()}.log" if own else f"{variable} names it"
                    raise UpError(f"No {name} server answers at {url} ({where}).")
                await asyncio.sleep(POLL_S)

    async def _until_ready(self) -> None:
        from services.cli.client import Client, ClientError
        from shared.contracts.records import Phase

        wanted = {plan.name for plan in self._plan.services if plan.kind in {"store", "worker"}}
        told_s = time.monotonic()
        async with Client(self._plan.url, _key()) as client:
            while True:
                missing = {"gateway"}
                if await client.ready():
                    try:
                        view = await client.cluster()
                    except ClientError as error:
                        if error.code in {"unauthenticated", "forbidden"}:
                            raise UpError(f"The gateway refuses the key of HEARTH_API_KEYS: {error}") from error
                    else:
                        missing = wanted - {
                            *(record.server_id for record in view.servers if record.phase is Phase.READY),
                            *(record.worker_id for record in view.workers if record.phase is Phase.READY),
                        }
                if not missing:
                    return
                if time.monotonic() - told_s > STILL_WAITING_S:
                    told_s = time.monotonic()
                    self._screen.say(f"still waiting for {', '.join(sorted(missing))}")
                await asyncio.sleep(POLL_S)

    async def _deploy_demo(self) -> None:
        from services.cli.client import Client, ClientError
        from services.cli.deploy import described
        from services.cli.progress import amount
        from shared.contracts.records import DeploymentRecord

        async with Client(self._plan.url, _key()) as client:
            for spec in demo_deployments():
                phase = ""
                try:
                    async for item in client.deploy(spec):
                        if isinstance(item, DeploymentRecord):
                            self._screen.say(described(item))
                        elif item.phase != phase:
                            phase = item.phase
                            self._screen.say(f"{spec.name}: {phase} {amount(item)}".rstrip())
                except ClientError as error:
                    self._screen.tell("hearth", f"{spec.name} cannot be deployed: {error}")

    async def _banner(self) -> None:
        from services.cli.client import Client, ClientError

        names: list[str] = []
        with contextlib.suppress(ClientError):
            async with Client(self._plan.url, _key()) as client:
                names = sorted(record.spec.name for record in (await client.cluster()).deployments)
        seconds = time.monotonic() - self._began_s
        self._screen.print(banner(self._plan, names, ready_s=seconds))

    # -- stopping ------------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        wait_s = _drain_s() + GRACE_S
        for kinds in STOP_ORDER:
            children = [child for child in self._children if child.plan.kind in kinds]
            async with asyncio.TaskGroup() as tasks:
                for child in children:
                    tasks.create_task(self._end(child, wait_s))

    async def _end(self, child: Child, wait_s: float) -> None:
        if not await child.stop(wait_s) and not self._forced:
            self._screen.tell(child.plan.name, f"did not drain within {wait_s:.0f} s and was killed")


def _key() -> str:
    """The first of the gateway's keys, if it wants one."""
    keys = [key.strip() for key in os.environ.get("HEARTH_API_KEYS", "").split(",") if key.strip()]
    return keys[0] if keys else os.environ.get("HEARTH_API_KEY", "")


def _drain_s() -> float:
    # The services have accepted it before this is asked.
    return float(os.environ.get("HEARTH_DRAIN_S") or 30.0)


def demo_deployments() -> tuple[DeploymentSpec, ...]:
    """The demo model under three names: as it is, with a short context, and in half the bytes."""
    from shared.contracts.records import DeploymentSpec
    from shared.contracts.residency import Source

    url = str(DEMO_DIR)
    return (
        DeploymentSpec(name="demo", source=Source(url=url)),
        DeploymentSpec(name="demo-short", source=Source(url=url), max_context_tokens=256),
        DeploymentSpec(name="demo-bf16", source=Source(url=url, dtype="bfloat16")),
    )


def banner(plan: Plan, names: list[str], *, ready_s: float) -> str:
    """What to do next, in lines that work when they are pasted."""
    url = plan.url
    model = "demo" if "demo" in names else names[0] if names else ""
    wish = plan.wish
    workers = wish.servers * wish.workers_per_server
    key = ' -H "Authorization: Bearer $HEARTH_API_KEY"' if os.environ.get("HEARTH_API_KEYS") else ""
    other_url = "" if url == "http://127.0.0.1:8080" else f" --url {url}"
    launcher = "./hearth"
    lines = [
        "",
        f"  Hearth answers at {url}",
        f"  ready after {ready_s:.1f} s · {_plural(wish.servers, 'server')} with {size(plan.dram_bytes)} DRAM, "
        f"{_plural(workers, 'worker')} · data and logs in {wish.data_dir}",
        "",
    ]
    if model:
        body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": QUESTION}]})
        lines += [
            f"    curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\",
            f"      -d '{body}'",
            "",
            "    from openai import OpenAI",
            f'    client = OpenAI(base_url="{url}/v1", api_key={_api_key_code()})',
            f'    messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            f'    for part in client.chat.completions.create(model="{model}", messages=messages, stream=True):',
            '        print(part.choices[0].delta.content or "", end="", flush=True)',
            "",
            f"    {launcher} chat {model}{other_url}",
        ]
    else:
        lines += [f"    {launcher} deploy NAME --source DIR|hf:ORG/NAME{other_url}"]
    lines += [f"    {launcher} ps{other_url}", "", "  Ctrl-C stops it.", ""]
    return "\n".join(lines)


def _api_key_code() -> str:
    return 'os.environ["HEARTH_API_KEY"]' if os.environ.get("HEARTH_API_KEYS") else '"none"'


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def up(options: argparse.Namespace) -> int:
    """Run `hearth up`."""
    screen = Screen(verbose=options.verbose)
    wish = Wish(
        data_dir=options.data_dir.absolute(),
        host=options.host,
        port=options.port,
        servers=options.servers,
        workers_per_server=options.workers_per_server,
        schedulers=options.schedulers,
        dram_bytes=options.dram,
        ssd_bytes=options.ssd,
        nats_port=options.nats_port,
        redis_port=options.redis_port,
    )
    try:
        data = DataDir(options.data_dir)
        try:
            if options.demo and not DEMO_DIR.is_dir():
                raise UpError(f"The demo model is missing: {DEMO_DIR} is no directory.")
            check_port(wish.host, wish.port, "--port")
            own = [
                name
                for name, variable in (("nats-server", "HEARTH_NATS_URL"), ("redis-server", "HEARTH_REDIS_URL"))
                if not os.environ.get(variable)
            ]
            programs = servers.obtain(own, data.path / "programs", screen.say)
            plan = make(wish, programs, dict(os.environ))
            plan.prepare()
            for note in plan.notes:
                screen.tell("hearth", note)
            workers = _plural(wish.servers * wish.workers_per_server, "worker")
            schedulers = _plural(wish.schedulers, "scheduler")
            screen.say(f"starting {_plural(wish.servers, 'server')}, {workers}, {schedulers}, gateway")
            return asyncio.run(_live(plan, data, screen, options.demo))
        finally:
            data.close()
    except (UpError, servers.ServersError) as error:
        print(f"hearth up: {error}", file=sys.stderr)
        return 1


async def _live(plan: Plan, data: DataDir, screen: Screen, demo: bool) -> int:
    return await Cluster(plan, data, screen, demo=demo).run()
