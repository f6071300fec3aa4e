"""Names and layouts of published checkpoints become the model's without a copy where memory lies as it must."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.store.manifest import execution_order, layout
from services.worker import attach as attaching
from services.worker.attach import attach
from services.worker.attach_names import stacked
from services.worker.loader import TorchLoader
from services.worker.loader_memory import Mappings
from tests.builders.images import make_lease, write_manifest
from tests.builders.models import make_model
from tests.unit.worker.test_loader import expected_tokens, strip_prefix, tokens_through

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loader() -> Iterator[TorchLoader]:
    made = TorchLoader(device="cpu")
    yield made
    made.close()


def lay_out_as_stored(directory: Path) -> None:
    """Write the weights again as an import lays them out."""
    path = directory / "model.safetensors"
    found = {name: tensor.clone() for name, tensor in load_file(path).items()}
    head, entries = layout({name: ("F32", tuple(tensor.shape)) for name, tensor in found.items()})
    with path.open("wb") as file:
        file.write(head)
        for name in entries:
            file.write(found[name].view(torch.uint8).numpy().tobytes())
    write_manifest(directory)


def refuse_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise AssertionError("the checkpoint is converted, with copies")

    monkeypatch.setattr(attaching, "_convert", convert)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_the_experts_of_a_stored_mixture_are_views(
    loader: TorchLoader, tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_model(tmp_path / "model", architecture, eos=False)
    expected = expected_tokens(directory)
    lay_out_as_stored(directory)
    assert any(".experts.3." in name for name in load_file(directory / "model.safetensors"))
    refuse_copies(monkeypatch)
    lease = make_lease(directory, tmp_path / "pool")
    assert tokens_through(loader, lease) == expected
    mappings = Mappings()
    attached = attach(lease, mappings)
    image = attached.image
    inside = range(image.address, image.address + image.size_bytes)
    assert all(parameter.data_ptr() in inside for parameter in attached.model.parameters())
    del attached
    mappings.release(image)
    mappings.close()


def test_experts_that_do_not_lie_side_by_side_are_copied(loader: TorchLoader, tmp_path: Path) -> None:
    directory = make_model(tmp_path / "model", "mixtral", eos=False)  # by name: gate, down, up
    expected = expected_tokens(directory)
    write_manifest(directory)
    lease = make_lease(directory, tmp_path / "pool")
    assert tokens_through(loader, lease) == expected
    mappings = Mappings()
    attached = attach(lease, mappings)
    assert attached.memory_bytes > lease.extents[0].length // 2, "its own memory counts"
    image = attached.image
    del attached
    mappings.release(image)
    mappings.close()


def test_names_without_the_models_prefix_need_no_copy(
    loader: TorchLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_model(tmp_path / "model", "gpt2", tie=True, eos=False)
    expected = expected_tokens(directory)
    strip_prefix(directory)
    write_manifest(directory)
    refuse_copies(monkeypatch)
    assert tokens_through(loader, make_lease(directory, tmp_path / "pool")) == expected


def test_a_stack_is_a_view_only_of_tensors_at_equal_distances() -> None:
    memory = torch.arange(200, dtype=torch.float32)

    def matrix(start: int, rows: int = 2, columns: int = 3) -> torch.Tensor:
        return memory.as_strided((rows, columns), (columns, 1), start)

    gate, up = [matrix(6), matrix(36), matrix(66)], [matrix(12), matrix(42), matrix(72)]
    joined = stacked([gate, up])
    assert joined is not None
    assert torch.equal(joined, torch.cat([torch.stack(gate), torch.stack(up)], dim=1))
    assert joined.data_ptr() == gate[0].data_ptr()
    alone = stacked([gate])
    assert alone is not None and torch.equal(alone, torch.stack(gate))
    one = stacked([gate[:1], up[:1]])
    assert one is not None and one.shape == (1, 4, 3)
    for lists in (
        [],
        [[]],
        [gate, up[:2]],
        [[matrix(6), matrix(36), matrix(67)]],
        [gate, [matrix(13), matrix(43), matrix(73)]],
        [gate[::-1]],
        [gate, [matrix(12, columns=4), matrix(42, columns=4), matrix(72, columns=4)]],
        [[matrix(6), matrix(36).t().contiguous().t(), matrix(66)]],
        [[matrix(6), torch.zeros(2, 3), matrix(66)]],
        [[torch.zeros(()), torch.zeros(())]],
        [[matrix(6), matrix(36, rows=3), matrix(66)]],
    ):
        assert stacked(lists) is None


def test_gate_and_up_lie_side_by_side_in_every_stored_mixture() -> None:
    layer = "model.layers.0.block_sparse_moe.experts"
    names = [f"{layer}.{expert}.w{matrix}.weight" for expert in (0, 10, 2) for matrix in (1, 2, 3)]
    ordered = [name.removeprefix(f"{layer}.").removesuffix(".weight") for name in execution_order(names)]
    assert ordered == ["0.w1", "0.w3", "0.w2", "2.w1", "2.w3", "2.w2", "10.w1", "10.w3", "10.w2"]
