"""Attaching a leased image: views without copies, every architecture, every way in which it can be wrong."""

from __future__ import annotations

import gc
import json
import random
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from services.store import manifest as store_manifest
from services.worker import attach
from services.worker.loader import AttachedModel, TorchLoader
from services.worker.loader_memory import Mappings
from services.worker.ports import AttachTimes, EndReason
from shared.contracts.manifest import MANIFEST_NAME, Manifest, decode_manifest, encode_manifest
from shared.contracts.requests import Sampling, TextPrompt
from shared.contracts.residency import Extent, Lease
from shared.errors import Code, HearthError
from tests.builders.images import make_lease, write_manifest
from tests.builders.models import make_model
from tests.unit.worker.sinks import Recorder

pytestmark = pytest.mark.torch

GREEDY = Sampling(temperature=0.0)
PROMPT = list(range(20, 60))
TOKENS = 10


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    expected_tokens.cache_clear()


@pytest.fixture
def loader() -> Iterator[TorchLoader]:
    made = TorchLoader(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("llama"), "llama", eos=False)
    write_manifest(directory)
    return directory


@cache
def expected_tokens(directory: Path, dtype: str = "float32") -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    ids = torch.tensor([PROMPT])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    tokens: list[int] = output[0, len(PROMPT) :].tolist()
    return tokens


def tokens_through(loader: TorchLoader, lease: Lease, **fields: Any) -> list[int]:
    heard = Recorder()
    values: dict[str, Any] = {"kv_bytes": 1 << 23, "slots": 4, "max_context_tokens": None, "sink": heard} | fields
    loaded = loader.load(lease, **values)
    try:
        loaded.engine.submit("a", PROMPT, first_index=0, max_new_tokens=TOKENS, sampling=GREEDY)
        assert heard.end("a").reason is EndReason.LENGTH
        return heard.tokens["a"]
    finally:
        loaded.close()


def strip_prefix(directory: Path) -> None:
    """Name GPT-2's tensors as old checkpoints do."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "h.0.attn.c_attn.weight" in renamed
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_model_answers_from_its_image(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    assert tokens_through(loader, lease) == expected_tokens(llama)
    assert tokens_through(loader, lease, engine="sequential") == expected_tokens(llama)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "opt", "gpt2", "gemma2", "mistral", "phi3"])
def test_other_architectures_and_tied_parameters(loader: TorchLoader, architecture: str, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", architecture, tie=architecture in {"qwen2", "gpt2", "opt"}, eos=False)
    write_manifest(directory)
    assert tokens_through(loader, make_lease(directory, tmp_path / "pool")) == expected_tokens(directory)


def test_several_extents_are_put_side_by_side(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool", pieces=(2, 0, 3, 1))
    assert len(lease.extents) == 4
    assert tokens_through(loader, lease) == expected_tokens(llama)


def test_extents_that_touch_are_one(llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    (whole,) = lease.extents
    halves = (
        Extent(offset=whole.offset, length=8192),
        Extent(offset=whole.offset + 8192, length=whole.length - 8192),
    )
    mappings = Mappings()
    image = mappings.map(msgspec.structs.replace(lease, extents=halves))
    assert not image.owned
    assert image.size_bytes == whole.length
    mappings.release(image)
    mappings.close()


def test_several_weight_files(loader: TorchLoader, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_model(tmp_path / "model", "llama", eos=False)
    expected = expected_tokens(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="200KB")
    manifest = write_manifest(directory)
    assert len(manifest.files) > 1
    assert tokens_through(loader, make_lease(directory, tmp_path / "pool")) == expected


def test_half_precision_and_a_tensor_of_another_type(loader: TorchLoader, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_model(tmp_path / "model", "llama", eos=False, dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    manifest = write_manifest(directory)
    assert manifest.checkpoint.dtype == "bfloat16"
    assert tokens_through(loader, make_lease(directory, tmp_path / "pool")) == expected_tokens(directory, "bfloat16")


def test_parameters_are_the_stores_memory_and_two_replicas_share_it(
    loader: TorchLoader, llama: Path, tmp_path: Path
) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    heard = Recorder()
    loaded = [loader.load(lease, kv_bytes=1 << 22, slots=2, max_context_tokens=None, sink=heard) for _ in range(2)]
    for number, one in enumerate(loaded):
        one.engine.submit(str(number), PROMPT, first_index=0, max_new_tokens=TOKENS, sampling=GREEDY)
    heard.ended("0", "1")
    assert heard.tokens["0"] == heard.tokens["1"] == expected_tokens(llama)
    entry = decode_manifest((llama / MANIFEST_NAME).read_bytes()).tensors["lm_head.weight"]
    with (tmp_path / "pool").open("r+b") as segment:  # what only the store may do: all tokens but 77 get no weight
        segment.seek(lease.extents[0].offset + entry.offset)
        segment.write(bytes(entry.bytes))
    loaded[0].engine.submit("2", PROMPT, first_index=0, max_new_tokens=3, sampling=GREEDY)
    loaded[1].engine.submit("3", PROMPT, first_index=0, max_new_tokens=3, sampling=GREEDY)
    heard.ended("2", "3")
    assert heard.tokens["2"] == heard.tokens["3"] == [0, 0, 0]
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if line.rstrip().endswith(str(tmp_path / "pool"))]
    assert [fields[1] for fields in mapped] == ["r--s"], "mapped once, and read-only"
    for one in loaded:
        one.close()
        one.close()


def test_two_models_in_one_worker_say_at_the_same_time_what_each_says_alone(
    loader: TorchLoader, llama: Path, tmp_path: Path
) -> None:
    """And a third one, whose tensors have to be converted, comes and goes meanwhile."""
    other = make_model(tmp_path / "other", "qwen2", eos=False, seed=5)
    write_manifest(other)
    third = make_model(tmp_path / "third", "mixtral", eos=False, dtype="bfloat16")
    write_manifest(third)
    leases = [make_lease(directory, tmp_path / f"pool-{directory.name}") for directory in (llama, other, third)]
    chance = random.Random(1)
    prompts = [[chance.randrange(5, 500) for _ in range(chance.randrange(1, 60))] for _ in range(8)]
    hows = [Sampling(seed=number, top_p=0.9) if number % 2 else GREEDY for number in range(8)]

    def submit(loaded: AttachedModel) -> None:
        for number, (prompt, how) in enumerate(zip(prompts, hows, strict=True)):
            loaded.engine.submit(str(number), prompt, first_index=0, max_new_tokens=60, sampling=how)

    alone: list[dict[str, list[int]]] = []
    for lease in leases[:2]:
        heard = Recorder()
        loaded = loader.load(lease, kv_bytes=1 << 22, slots=8, max_context_tokens=None, sink=heard)
        submit(loaded)
        heard.ended(*map(str, range(8)))
        loaded.close()
        alone.append(heard.tokens)
    third_alone = tokens_through(loader, leases[2])
    together = [Recorder(), Recorder()]
    both = [
        loader.load(lease, kv_bytes=1 << 22, slots=8, max_context_tokens=None, sink=heard)
        for lease, heard in zip(leases[:2], together, strict=True)
    ]
    for loaded in both:
        submit(loaded)
    assert tokens_through(loader, leases[2]) == third_alone
    for heard in together:
        heard.ended(*map(str, range(8)))
    for loaded in both:
        loaded.close()
    assert [heard.tokens for heard in together] == alone


def test_a_new_file_under_the_old_name_is_mapped_anew(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", "llama", eos=False, seed=5)
    write_manifest(other)
    assert expected_tokens(other) != expected_tokens(llama)
    for directory in (llama, other, llama):
        lease = make_lease(directory, tmp_path / "pool")
        assert tokens_through(loader, lease) == expected_tokens(directory)


def test_nothing_stays_mapped_after_close(llama: Path, tmp_path: Path) -> None:
    loader = TorchLoader(device="cpu")
    for pieces in (None, (1, 0)):
        tokens_through(loader, make_lease(llama, tmp_path / f"pool-{pieces}", pieces=pieces))
    loader.close()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_the_limit_is_the_smallest_of_all(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    for wanted, expected in ((None, 512), (100, 100), (4096, 512)):
        loaded = loader.load(lease, kv_bytes=1 << 23, slots=2, max_context_tokens=wanted, sink=Recorder())
        assert loaded.max_context_tokens == loaded.engine.max_sequence_tokens == expected
        assert loaded.memory_bytes > 0
        assert loaded.times.total_s >= loaded.times.engine_s > 0
        assert loaded.tokenizer.decode(loaded.tokenizer.encode_prompt(TextPrompt(text="the fire"))) == "the fire"
        loaded.close()


def test_warm_up_and_device(llama: Path, tmp_path: Path) -> None:
    loader = TorchLoader(device="auto")
    loader.warm_up()
    assert loader.device.memory_bytes > 0
    assert loader.device.device == "cpu" or loader.device.device.startswith("cuda:")
    loader.close()
    for wrong in ("cuda:99", "abacus", "meta"):
        with pytest.raises(HearthError) as refused:
            TorchLoader(device=wrong)
        assert refused.value.failure.code is Code.UNAVAILABLE


def test_a_closed_model_is_gone_even_if_it_is_a_cycle_and_has_no_image() -> None:
    """As on a device with memory of its own: what stayed until some later collection would be missing for the next."""

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    class Engine:
        def __init__(self) -> None:
            self.model: Cycle | None = Cycle()

        def close(self) -> None:
            self.model = None

    engine = Engine()
    model = weakref.ref(engine.model)
    values: dict[str, Any] = {"engine": engine, "tokenizer": None, "times": AttachTimes(), "mappings": Mappings()}
    loaded = AttachedModel(max_context_tokens=1, memory_bytes=1, image=None, **values)
    gc.disable()
    try:
        loaded.close()
        assert model() is None
        loaded.close()
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "big"},
        {"hidden_size": -1},
        {"hidden_act": 5},
        {"layer_types": ["a", "b"]},
        {"eos_token_id": ["end"]},
        {"num_attention_heads": 0},
        {"head_dim": 0},
        {"pad_token_id": 99_999},
    ],
    ids=str,
)
def test_a_config_with_values_that_make_no_sense_is_refused(
    loader: TorchLoader, llama: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, make_lease(directory, tmp_path / "pool"))
    assert refused.value.failure.code is Code.UNSUPPORTED


def test_a_device_that_is_full_is_no_corrupt_checkpoint(
    loader: TorchLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_model(tmp_path / "model", "mixtral", eos=False)
    write_manifest(directory)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.MixtralForCausalLM.from_pretrained", full)
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, make_lease(directory, tmp_path / "pool"))
    assert refused.value.failure.code is Code.OUT_OF_MEMORY


def edit_manifest(directory: Path, edit: Callable[[Manifest], Manifest]) -> None:
    path = directory / MANIFEST_NAME
    path.write_bytes(encode_manifest(edit(decode_manifest(path.read_bytes()))))


def with_tensor(manifest: Manifest, name: str, **fields: Any) -> Manifest:
    entry = msgspec.structs.replace(manifest.tensors[name], **fields)
    return msgspec.structs.replace(manifest, tensors=manifest.tensors | {name: entry})


def without_tensor(manifest: Manifest, name: str) -> Manifest:
    return msgspec.structs.replace(
        manifest, tensors={key: entry for key, entry in manifest.tensors.items() if key != name}
    )


def test_every_dtype_that_torch_has_whole_elements_of_is_mapped() -> None:
    of_store = {name: torch_name for name, (bits, torch_name) in store_manifest.DTYPES.items() if bits >= 8}
    assert {name: str(dtype) for name, dtype in attach.DTYPES.items()} == {
        name: f"torch.{torch_name}" for name, torch_name in of_store.items()
    }


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda m: with_tensor(m, NORM, shape=(32,)), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, shape=(8, 8)), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, offset=1 << 40), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, offset=-4096), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, offset=m.tensors[NORM].offset + 1), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, file=3), Code.CHECKPOINT_CORRUPT),
        (lambda m: with_tensor(m, NORM, dtype="F4"), Code.UNSUPPORTED),
        (lambda m: without_tensor(m, NORM), Code.CHECKPOINT_CORRUPT),
    ],
)
def test_a_manifest_that_does_not_fit_the_model(
    loader: TorchLoader, llama: Path, tmp_path: Path, edit: Callable[[Manifest], Manifest], code: Code
) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    lease = make_lease(directory, tmp_path / "pool")
    edit_manifest(directory, edit)
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, lease)
    assert refused.value.failure.code is code
    # and the loader goes on
    assert tokens_through(loader, make_lease(llama, tmp_path / "pool")) == expected_tokens(llama)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model_type": "bert"}, Code.UNSUPPORTED),
        ({"model_type": "no-such-thing", "auto_map": {"AutoConfig": "evil.Config"}}, Code.UNSUPPORTED),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, Code.UNSUPPORTED),
        ({"hidden_size": 128}, Code.CHECKPOINT_CORRUPT),
        ({"num_hidden_layers": 3}, Code.CHECKPOINT_CORRUPT),
    ],
)
def test_a_config_that_cannot_be_served(
    loader: TorchLoader, llama: Path, tmp_path: Path, changes: dict[str, Any], code: Code
) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, make_lease(directory, tmp_path / "pool"))
    assert refused.value.failure.code is code


def test_a_lease_that_cannot_be_mapped(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    (whole,) = lease.extents
    cases: dict[Code, dict[str, Any]] = {
        Code.CHECKPOINT_UNAVAILABLE: {"segment": str(tmp_path / "none")},
        Code.CHECKPOINT_CORRUPT: {"extents": (Extent(offset=whole.offset, length=whole.length - 4096),)},
    }
    for code, fields in cases.items():
        with pytest.raises(HearthError) as refused:
            tokens_through(loader, msgspec.structs.replace(lease, **fields))
        assert refused.value.failure.code is code
    for extents in ((), (Extent(offset=0, length=1 << 40),), (Extent(offset=100, length=4096),)):
        with pytest.raises(HearthError) as refused:
            tokens_through(loader, msgspec.structs.replace(lease, extents=extents))
        assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT


def test_an_engine_that_does_not_exist(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, make_lease(llama, tmp_path / "pool"), engine="steam")
    assert refused.value.failure.code is Code.UNSUPPORTED


def test_a_directory_that_is_gone_or_has_a_broken_manifest(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(llama, tmp_path / "model")
    lease = make_lease(directory, tmp_path / "pool")
    (directory / MANIFEST_NAME).write_text("{}")
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, lease)
    assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT
    shutil.rmtree(directory)
    with pytest.raises(HearthError) as refused:
        tokens_through(loader, lease)
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_gets_a_copy_from_pinned_memory(llama: Path, tmp_path: Path) -> None:
    loader = TorchLoader(device="cuda")
    for pieces in (None, (1, 0)):
        lease = make_lease(llama, tmp_path / f"pool-{pieces}", pieces=pieces)
        before = torch.cuda.memory_allocated()
        assert tokens_through(loader, lease) == expected_tokens(llama)
        assert torch.cuda.memory_allocated() <= before + (1 << 20)
    loader.close()
