"""What Hearth answers is what the model says: tokens equal `generate()`'s, alone, in a batch and after a crash."""

from __future__ import annotations

import concurrent.futures
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.builders.cluster import Cluster
from tests.e2e.conftest import Models

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]

PROMPTS = [f"The hearth keeps the fire number {n}, and the" for n in range(16)]


def generated(directory: Path, prompts: list[str], tokens: int) -> list[str]:
    """What `model.generate()` says on the original checkpoint, greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def complete(cluster: Cluster, model: str, prompt: str, **options: Any) -> str:
    status, body = cluster.call(
        "POST", "/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0, **options}
    )
    assert status == 200, body
    return str(body["choices"][0]["text"])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "opt", "gpt2"])
def test_greedy_tokens_equal_generate(cluster: Cluster, models: Models, architecture: str) -> None:
    directory = models(architecture)
    name = f"exact/{architecture}"
    cluster.deploy(name, directory)
    expected = generated(directory, PROMPTS, 24)
    assert complete(cluster, name, PROMPTS[0]) == expected[0]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda prompt: complete(cluster, name, prompt), PROMPTS)) == expected
    cluster.call("DELETE", f"/v1/admin/deployments/{name}")


def test_sampled_tokens_with_a_seed_do_not_depend_on_the_batch(cluster: Cluster, models: Models) -> None:
    cluster.deploy("sampled", models("llama"))

    def sample(seed: int) -> str:
        return complete(cluster, "sampled", PROMPTS[0], temperature=1.0, top_p=0.95, seed=seed)

    alone = [sample(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(sample, range(16)))
    assert together[:4] == alone
    assert sample(3) == alone[3]


def lines_of(cluster: Cluster, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        cluster.url + "/v1/completions",
        json.dumps(body | {"stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=120)


@pytest.mark.by_hand  # in every run: `test_recovery.py`
def test_a_stream_survives_the_death_of_its_worker(cluster: Cluster, models: Models) -> None:
    """kill -9 in the middle: the stream goes on elsewhere, token for token."""
    cluster.deploy("survivor", models("llama", context=2048, eos=False))
    body = {"model": "survivor", "prompt": PROMPTS[0], "max_tokens": 600, "temperature": 1.0, "seed": 5}
    status, undisturbed = cluster.call("POST", "/v1/completions", body)
    assert status == 200, undisturbed
    text, killed = "", False
    with lines_of(cluster, body) as stream:
        for line in stream:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += event["choices"][0]["text"]
            if not killed and len(text) > 50:
                holders = {
                    r["worker_id"] for r in cluster.view()["replicas"] if r["deployment"] == "survivor" and r["running"]
                }
                if holders:
                    killed = True
                    victim = holders.pop()
                    cluster.kill(victim)
    assert killed
    assert text == undisturbed["choices"][0]["text"]
    cluster.processes[victim].wait(60)
    cluster.start(victim)
    cluster.until(lambda: sum(w["phase"] == "ready" for w in cluster.view()["workers"]) == 2, "the worker is back")
