"""`hearth explain` against a real gateway, with a scheduler written by hand."""

from __future__ import annotations

import json

import pytest

from tests.integration.cli.test_moves_actions import hearth
from tests.integration.gateway.harness import cluster
from tests.integration.gateway.test_gateway_explain import Scheduler

Capture = pytest.CaptureFixture[str]


async def test_a_deployment_and_a_request_are_explained(
    nats_url: str, redis_url: str, prefix: str, capsys: Capture
) -> None:
    async with cluster(nats_url, redis_url, prefix) as it:
        await it.deploy()
        await it.worker()
        _, _, headers = await it.chat()
        request_id = headers["x-hearth-request-id"]

        assert await hearth(it, "explain", "m") == 1
        assert capsys.readouterr().err == "hearth: The scheduler does not answer.\n"
        assert await hearth(it, "explain", request_id) == 0
        text = capsys.readouterr().out
        assert f"request {request_id} of m ended (stop)" in text
        assert "the decisions are not known: The scheduler does not answer." in text

        scheduler = await Scheduler().start(it)
        assert await hearth(it, "explain", "m", "--last", "2") == 0
        text = capsys.readouterr().out
        assert scheduler.asked[-1].limit == 2
        assert "▸ w1 s1 DRAM – 0.500 s – – 0.500 s" in " ".join(text.split())
        assert "estimates were off by 5 % at the median" in text

        assert await hearth(it, "explain") == 0
        assert scheduler.asked[-1].deployment == ""
        capsys.readouterr()
        assert await hearth(it, "explain", request_id[:8], "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["request"]["request_id"], answer["request"]["ledger"]["tier"]) == (request_id, "ssd")
        assert answer["explanation"]["decisions"][0]["actual_s"] == 0.6

        assert await hearth(it, "explain", "nothing") == 1
        said = capsys.readouterr().err
        assert said.startswith("hearth: No deployment is called 'nothing'. This gateway knows no request 'nothing';")
