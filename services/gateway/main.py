"""The wiring: settings → log → clients → core → subscriptions and flush → HTTP → record `ready`."""

from __future__ import annotations

import os
import sys
from typing import Final

from aiohttp import web

from services.gateway.core import Config
from services.gateway.http import make_app
from services.gateway.service import Gateway
from shared.contracts.records import GatewayRecord, Phase
from shared.lifecycle import Context, run
from shared.settings import GatewaySettings

# Until a request that was given back and is not claimed is looked for: a claim takes milliseconds where there is room.
MOST_RECLAIM_S: Final = 2.0


async def serve(context: Context[GatewaySettings]) -> None:
    """One whole life of a gateway."""
    await serve_checked(context, check=False)


async def serve_checked(context: Context[GatewaySettings], *, check: bool) -> None:
    """The same; with `check`, the core's invariants are asserted after every event (tests)."""
    settings = context.settings
    config = Config(
        max_deliveries=settings.max_deliveries,
        check_s=settings.check_s,
        lost_after_s=settings.lost_after_s,
        reclaim_s=min(MOST_RECLAIM_S, settings.ack_wait_s),
    )
    gateway = Gateway(context, config, check=check)
    context.tasks.create_task(gateway.run(), name="core")
    await gateway.subscribe()
    await gateway.look()
    context.tasks.create_task(gateway.keep_looking(), name="deployments")
    # Without handler_cancellation a client that leaves would never be noticed.
    runner = web.AppRunner(
        make_app(gateway), handler_cancellation=True, access_log=None, shutdown_timeout=2.0, tcp_keepalive=True
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, settings.http_host, settings.http_port, backlog=1024).start()
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

        def record(phase: Phase) -> GatewayRecord:
            return GatewayRecord(
                gateway_id=context.id,
                phase=phase,
                url=url,
                pid=os.getpid(),
                open_requests=gateway.core.open_requests,
            )

        context.heartbeat(record)
        await context.ready()
        context.log.info("http.opened", url=url)
        await context.stopping.wait()
        await context.drain()
        await gateway.drain(settings.drain_s)
    finally:
        await runner.cleanup()


def main() -> int:
    """Run a gateway until it is told to stop; its exit code."""
    return run("gateway", GatewaySettings, serve)


if __name__ == "__main__":
    sys.exit(main())
