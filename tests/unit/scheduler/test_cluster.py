"""The picture: looks, single records, and sums of memory."""

from __future__ import annotations

from services.scheduler.cluster import Cluster
from services.scheduler.commands import PendingLoad
from shared.capacity import context_tokens, kv_cache_bytes
from shared.contracts.records import ClusterView, ReplicaState
from tests.unit.scheduler import picture
from tests.unit.scheduler.picture import MIB


def test_kv_cache_has_room_for_every_slot_up_to_the_limit_and_for_one_context_always() -> None:
    def blocks(slots: int, context: int, most: int) -> int:
        return kv_cache_bytes(kv_bytes_per_token=2, slots=slots, max_context_tokens=context, most_bytes=most) // 32

    assert blocks(4, 100, 10**9) == 4 * 7
    assert blocks(4, 100, 32 * 10 + 31) == 10
    assert blocks(4, 100, 32) == 7
    assert kv_cache_bytes(kv_bytes_per_token=0, slots=4, max_context_tokens=9, most_bytes=9) == 0
    assert (context_tokens(100, None), context_tokens(100, 50), context_tokens(100, 500)) == (100, 50, 100)


def test_a_look_that_began_before_a_record_was_read_does_not_undo_it() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint())
    cluster.put(picture.worker("a0"), 1.0)
    cluster.put(picture.replica("m1", record), 1.0)
    cluster.touched("replica", "m1", 5.0)
    cluster.remove_replica("m1", 5.0)
    old = ClusterView(workers=(picture.worker("a0"),), replicas=(picture.replica("m1", record),))
    assert cluster.replace(old, 4.0, 6.0) == []
    assert cluster.replicas == {}
    cluster.replace(old, 7.0, 8.0)
    assert list(cluster.replicas) == ["m1"]


def test_a_look_tells_which_replicas_are_gone() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint())
    cluster.put(picture.replica("m1", record, state=ReplicaState.LOADING), 1.0)
    assert [one.replica_id for one in cluster.replace(ClusterView(), 2.0, 2.0)] == ["m1"]


def test_hints_count_as_one_request_until_a_later_reading() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec())
    cluster.deployments["m"] = record
    cluster.hinted_at["m"] = 10.0
    assert cluster.outstanding("m") == 1
    cluster.put_depths({}, 9.0)
    assert cluster.outstanding("m") == 1
    cluster.put_depths({record.slug: 5, "stranger": 3}, 9.5)
    assert cluster.outstanding("m") == 5
    cluster.put_depths({}, 11.0)
    assert cluster.outstanding("m") == 0


def test_replicas_of_one_server_share_their_checkpoint_in_the_pool() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(max_replicas=2), picture.checkpoint(weights=300, kv=20))
    cluster.deployments["m"] = record
    for id in ("a0", "a1"):
        cluster.put(picture.worker(id), 1.0)
        cluster.put(picture.replica(f"m-{id}", record, id, memory=20), 1.0)
    assert cluster.pool_used_bytes("a", 1.0) == 300 * MIB
    assert [cluster.used_bytes(id) for id in ("a0", "a1")] == [20 * MIB, 20 * MIB]


def test_a_gpu_replica_frees_the_pool_once_it_is_ready() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint(weights=300, kv=20))
    cluster.deployments["m"] = record
    cluster.put(picture.worker("a0", device="cuda:0"), 1.0)
    cluster.put(picture.replica("m1", record, state=ReplicaState.LOADING), 1.0)
    assert (cluster.pool_used_bytes("a", 2.0), cluster.used_bytes("a0")) == (300 * MIB, 320 * MIB)
    cluster.put(picture.replica("m1", record, memory=321), 2.0)
    assert (cluster.pool_used_bytes("a", 2.0), cluster.used_bytes("a0")) == (0, 321 * MIB)


def test_what_a_replica_gave_back_counts_as_free_before_the_store_says_so() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint(weights=300))
    cluster.deployments["m"] = record
    cluster.put(picture.server("a", leased=300), 1.0)
    cluster.put(picture.worker("a0"), 1.0)
    cluster.put(picture.replica("m1", record), 1.0)
    cluster.remove_replica("m1", 2.0)
    assert cluster.leased_bytes(cluster.servers["a"], 2.0) == 0
    assert cluster.leased_bytes(cluster.servers["a"], 9.0) == 300 * MIB
    cluster.put(picture.server("a", leased=0), 9.0)
    assert cluster.leased_bytes(cluster.servers["a"], 9.0) == 0


def test_what_is_read_of_a_replica_that_its_worker_has_buried_is_old() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint())
    cluster.put(picture.worker("a0"), 1.0)
    cluster.put(picture.replica("m1", record), 1.0)
    cluster.bury("m1", 2.0)
    cluster.remove_replica("m1", 2.0)
    cluster.put(picture.replica("m1", record), 3.0)
    assert (dict(cluster.replicas), cluster.replica_count("a0")) == ({}, 0)


def test_a_worker_whose_record_is_gone_has_the_device_that_it_had() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    record = picture.deployment(picture.spec(), picture.checkpoint(weights=300, kv=20))
    cluster.deployments["m"] = record
    cluster.put(picture.worker("a0", device="cuda:0"), 1.0)
    cluster.put(picture.replica("m1", record, memory=320), 1.0)
    cluster.remove_worker("a0")
    cluster.put(picture.server("a"), 2.0)
    assert cluster.pool_used_bytes("a", 2.0) == 0, "its parameters are on the GPU, whoever has last heard of it"


def test_a_load_is_given_up_only_after_a_look_that_could_have_shown_it() -> None:
    cluster = Cluster(kv_bytes_max=2**40)
    cluster.loads["m1"] = PendingLoad("m1", "m", "r", "a0", "a", "ck-m", 1, 1, 10.0)
    assert cluster.expire(11.0) == ([], [], []), "the registry has not been read since"
    cluster.replace(ClusterView(), 9.0, 11.5)
    assert cluster.expire(12.0)[0] == []
    cluster.replace(ClusterView(), 10.5, 12.0)
    assert [load.replica_id for load in cluster.expire(12.0)[0]] == ["m1"]
