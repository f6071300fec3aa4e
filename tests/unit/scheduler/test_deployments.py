"""Deploying, changing and deleting."""

from __future__ import annotations

import pytest

from services.scheduler.deployments import revision_of, validate
from services.scheduler.events import (
    Answer,
    CommandLoad,
    CommandStop,
    DeploymentUnwritten,
    ImportMoved,
    InspectSource,
    OperationFailed,
    PollImport,
    RemoveDeployment,
    SourceInspected,
    WriteDeployment,
)
from shared.contracts.placement import Deployed, Deploying
from shared.contracts.records import DeploymentState, ReplicaState
from shared.contracts.residency import Done, Inspected, Progress
from shared.errors import Code, Failure
from tests.unit.scheduler import picture
from tests.unit.scheduler.desk import Desk
from tests.unit.scheduler.picture import MIB

INVALID = Failure(code=Code.INVALID_CHECKPOINT, message="There is no config.json.")
AWAY = Failure(code=Code.UNAVAILABLE, message="Nobody answers.")


@pytest.fixture
def desk() -> Desk:
    """Two servers; b has more free SSD."""
    desk = Desk()
    desk.add(picture.server("a", ssd_free=1000), picture.server("b", ssd_free=2000))
    return desk.add(picture.worker("a0"), picture.worker("b0")).start()


def inspected(desk: Desk, weight_mib: float = 100) -> InspectSource:
    """The inspection under way ends well."""
    asked = desk.only(InspectSource)
    found = Inspected(architecture="LlamaForCausalLM", weight_bytes=int(weight_mib * MIB))
    desk.tell(SourceInspected(asked.deployment, asked.operation, found))
    return asked


def code_of(answers: list[object]) -> Code:
    """The code of the one answer, a failure."""
    assert len(answers) == 1
    (answer,) = answers
    assert isinstance(answer, Failure)
    return answer.code


def test_deploying_inspects_registers_imports_and_is_ready(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    assert desk.deployments == {}
    assert inspected(desk).server_id == "b"
    record = desk.deployments["m"]
    assert (record.state, record.checkpoint, record.weight_bytes) == (DeploymentState.IMPORTING, None, 100 * MIB)
    desk.imported(picture.checkpoint())
    desk.answers()
    record = desk.deployments["m"]
    assert (record.state, record.checkpoint) == (DeploymentState.READY, picture.checkpoint())
    assert answers == [Deployed(record=record)]


def test_requests_wait_while_the_model_is_imported(desk: Desk) -> None:
    desk.deploy(picture.spec("m"))
    inspected(desk)
    desk.queue("m", 1)
    desk.hint("m")
    desk.wait(3.0)
    assert desk.take(CommandLoad) == []
    desk.imported(picture.checkpoint())
    assert desk.only(CommandLoad).message.deployment == "m"


def test_a_long_poll_is_answered_with_the_progress(desk: Desk) -> None:
    first = desk.deploy(picture.spec("m"), wait_s=2.0)
    inspected(desk)
    poll = desk.only(PollImport)
    progress = Progress(phase="importing", done_bytes=5, total_bytes=10)
    desk.tell(ImportMoved("m", poll.operation, progress))
    desk.wait(1.9)
    desk.answers()
    assert first == []
    desk.wait(0.2)
    desk.answers()
    assert first == [Deploying(progress=progress)]
    second = desk.deploy(picture.spec("m"))
    desk.imported(picture.checkpoint())
    desk.answers()
    assert isinstance(second[0], Deployed)


def test_the_same_again_looks_at_the_source_again_and_changes_nothing(desk: Desk) -> None:
    ready(desk)
    before = desk.deployments["m"]
    desk.servers["a"] = picture.server("a", ssd_free=1000, ssd={"ck-m": 100}, dram={"ck-m": 100})
    desk.wait(1.1)
    again = desk.deploy(picture.spec("m"))
    assert desk.imported(picture.checkpoint()).server_id == "a"  # which has the checkpoint, not the most room
    assert [type(one) for one in desk.out] == [Answer]
    desk.answers()
    assert again == [Deployed(record=before)]
    assert desk.deployments["m"] == before


def test_the_same_again_finds_other_weights_and_replaces_the_replicas(desk: Desk) -> None:
    ready(desk)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.loaded(running=1)
    answers = desk.deploy(picture.spec("m"))
    desk.imported(picture.checkpoint("ck-new"))
    desk.answers()
    record = desk.deployments["m"]
    assert answers == [Deployed(record=record)]
    assert record.checkpoint == picture.checkpoint("ck-new")
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.drain) == (load.message.replica_id, True)
    again = desk.only(CommandLoad)
    assert (again.message.checkpoint_id, again.message.revision) == ("ck-new", record.revision)
    assert record.revision != load.message.revision
    # Other limits, and the same once more, leave it so.
    desk.deploy(picture.spec("m", keep_alive_s=5.0))
    desk.deploy(picture.spec("m", keep_alive_s=5.0))
    desk.imported(picture.checkpoint("ck-new"))
    assert desk.deployments["m"].revision == record.revision


def test_the_same_again_whose_source_is_gone_says_so_and_stays_as_it_was(desk: Desk) -> None:
    ready(desk)
    before = desk.deployments["m"]
    answers = desk.deploy(picture.spec("m"))
    desk.tell(OperationFailed("m", desk.only(PollImport).operation, INVALID))
    desk.answers()
    assert answers == [INVALID]
    assert desk.deployments["m"] == before


def test_a_success_between_two_polls_is_heard_by_the_next(desk: Desk) -> None:
    desk.deploy(picture.spec("m"), wait_s=0.5)
    inspected(desk)
    desk.wait(1.0)
    desk.imported(picture.checkpoint())
    desk.out.clear()
    second = desk.deploy(picture.spec("m"))
    desk.answers()
    assert isinstance(second[0], Deployed)
    assert desk.take(PollImport) == []


def test_nobody_waits_for_an_import_that_only_learns_facts(desk: Desk) -> None:
    desk.deploy(picture.spec("m", lazy=True))
    inspected(desk)
    desk.answers()
    desk.hint("m")
    load = desk.only(CommandLoad)
    desk.shows(load.message, load.worker_id, ReplicaState.READY, checkpoint_id="ck-m")
    poll = desk.only(PollImport)
    answers = desk.deploy(picture.spec("m", lazy=True))
    desk.tell(OperationFailed("m", poll.operation, INVALID))
    desk.answers()
    assert answers == [Deployed(record=desk.deployments["m"])]


def test_a_refused_source_leaves_nothing(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    asked = desk.only(InspectSource)
    desk.tell(OperationFailed("m", asked.operation, INVALID))
    desk.answers()
    assert answers == [INVALID]
    assert desk.deployments == {}
    assert desk.take(WriteDeployment) == []


def test_a_failed_import_leaves_nothing_and_says_so_when_nothing_is_left(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    inspected(desk)
    poll = desk.only(PollImport)
    desk.written = False
    desk.tell(OperationFailed("m", poll.operation, INVALID))
    desk.answers()
    assert answers == []
    removal = desk.only(RemoveDeployment)
    desk.tell(DeploymentUnwritten("m", AWAY))
    desk.written = True
    desk.wait(1.0)
    desk.answers()
    assert answers == [INVALID]
    assert (desk.deployments, removal.record.spec.name) == ({}, "m")
    assert isinstance(desk.deploy(picture.spec("m")), list)
    assert desk.only(InspectSource).deployment == "m"


def test_a_failure_between_two_polls_is_heard_by_the_next(desk: Desk) -> None:
    first = desk.deploy(picture.spec("m"), wait_s=0.5)
    inspected(desk)
    desk.wait(1.0)
    desk.answers()
    assert isinstance(first[0], Deploying)
    poll = desk.only(PollImport)
    desk.tell(OperationFailed("m", poll.operation, INVALID))
    second = desk.deploy(picture.spec("m"))
    desk.answers()
    assert second == [INVALID]
    desk.deploy(picture.spec("m"))
    assert desk.only(InspectSource).deployment == "m"


def test_a_store_that_does_not_answer_is_asked_again_then_another_then_it_fails(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    asked: list[str] = []
    for _ in range(5):
        one = desk.only(InspectSource)
        asked.append(one.server_id)
        desk.tell(OperationFailed("m", one.operation, AWAY))
        desk.wait(6.0)
    desk.answers()
    assert asked == ["b", "b", "b", "a", "b"]
    assert isinstance(answers[0], Deploying)
    desk.out.clear()
    assert code_of(_polled(desk)) is Code.UNAVAILABLE


def _polled(desk: Desk) -> list[object]:
    answers = desk.deploy(picture.spec("m"))
    desk.answers()
    return answers


def test_a_model_for_which_no_worker_has_room_is_refused_with_the_numbers(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    inspected(desk, weight_mib=1001)
    desk.answers()
    assert code_of(answers) is Code.TOO_LARGE
    message = answers[0].message  # type: ignore[attr-defined]
    assert "1001 MiB" in message
    assert "context" not in message, "nobody has counted a KV cache yet"
    assert desk.deployments == {}


def test_a_context_larger_than_every_worker_is_refused_after_the_import(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m"))
    inspected(desk)
    desk.imported(picture.checkpoint(kv=501))
    desk.answers()
    assert code_of(answers) is Code.TOO_LARGE
    assert answers[-1].message.endswith("A shorter context needs less.")  # type: ignore[attr-defined]
    assert desk.deployments == {}


def test_without_a_server_nothing_is_registered() -> None:
    desk = Desk().start()
    answers = desk.deploy(picture.spec("m"))
    desk.answers()
    assert code_of(answers) is Code.UNAVAILABLE
    assert desk.deployments == {}


def test_a_lazy_deployment_is_ready_at_once_and_learns_its_checkpoint_from_the_first_replica(desk: Desk) -> None:
    answers = desk.deploy(picture.spec("m", lazy=True))
    inspected(desk)
    desk.answers()
    assert isinstance(answers[0], Deployed)
    assert desk.take(PollImport) == []
    desk.hint("m")
    load = desk.only(CommandLoad)
    assert (load.message.checkpoint, load.message.checkpoint_id, load.message.kv_bytes) == (None, "", 0)
    desk.shows(load.message, load.worker_id, ReplicaState.READY, checkpoint_id="ck-m")
    poll = desk.only(PollImport)
    assert poll.server_id == load.worker_id[0]
    desk.out.append(poll)
    desk.imported(picture.checkpoint())
    record = desk.deployments["m"]
    assert (record.checkpoint, record.revision) == (picture.checkpoint(), load.message.revision)
    desk.wait(3.0)
    assert desk.take(CommandStop) == []


def ready(desk: Desk) -> None:
    """A deployment m that is ready."""
    desk.deploy(picture.spec("m"))
    inspected(desk)
    desk.imported(picture.checkpoint())
    desk.answers()
    desk.out.clear()


def test_changed_settings_do_not_touch_the_replicas(desk: Desk) -> None:
    ready(desk)
    desk.hint("m")
    desk.loaded(running=1)
    answers = desk.deploy(picture.spec("m", keep_alive_s=5.0, max_replicas=3))
    desk.answers()
    assert isinstance(answers[0], Deployed)
    assert desk.deployments["m"].spec.keep_alive_s == 5.0
    assert desk.take(CommandStop) == []


def test_what_replicas_depend_on_drains_the_old_ones(desk: Desk) -> None:
    ready(desk)
    desk.queue("m", 1)
    desk.hint("m")
    load = desk.loaded(running=1)
    desk.deploy(picture.spec("m", target_concurrency=7))
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.drain) == (load.message.replica_id, True)
    again = desk.only(CommandLoad)
    assert again.message.slots == 7
    assert again.message.revision != load.message.revision


def test_another_source_is_imported_before_anything_changes(desk: Desk) -> None:
    ready(desk)
    before = desk.deployments["m"]
    answers = desk.deploy(picture.spec("m", url="/models/other"))
    inspected(desk)
    assert desk.deployments["m"] == before
    poll = desk.only(PollImport)
    desk.tell(OperationFailed("m", poll.operation, INVALID))
    desk.answers()
    assert answers == [INVALID]
    assert desk.deployments["m"] == before
    answers = desk.deploy(picture.spec("m", url="/models/other"))
    inspected(desk)
    desk.imported(picture.checkpoint("ck-other"))
    desk.answers()
    record = desk.deployments["m"]
    assert answers == [Deployed(record=record)]
    assert record.checkpoint == picture.checkpoint("ck-other")
    assert (record.created_at_s, record.epoch > before.epoch) == (before.created_at_s, True)


def test_two_different_wishes_at_once_conflict(desk: Desk) -> None:
    desk.deploy(picture.spec("m"))
    answers = desk.deploy(picture.spec("m", url="/models/other"))
    desk.answers()
    assert code_of(answers) is Code.CONFLICT


def test_a_failed_deployment_may_be_tried_again_by_deploying_it(desk: Desk) -> None:
    ready(desk)
    desk.core.deployments.set_failure("m", INVALID)
    desk.deploy(picture.spec("m"))
    assert desk.deployments["m"].failure is None


def test_deleting_ends_the_replicas_and_removes_queue_and_record(desk: Desk) -> None:
    ready(desk)
    desk.hint("m")
    load = desk.loaded(running=1)
    answers = desk.delete("m")
    desk.answers()
    stop = desk.only(CommandStop)
    assert (stop.message.replica_id, stop.message.abort) == (load.message.replica_id, True)
    assert answers == [Done()]
    assert desk.deployments == {}
    again = desk.delete("m")
    desk.answers()
    assert code_of(again) is Code.UNKNOWN_MODEL


def test_deleting_says_so_first_and_is_retried_until_it_is_done(desk: Desk) -> None:
    ready(desk)
    desk.written = False
    answers = desk.delete("m")
    write = desk.only(WriteDeployment)
    assert write.record.state is DeploymentState.DELETING
    desk.tell(DeploymentUnwritten("m", AWAY))
    again = desk.delete("m")
    desk.written = True
    desk.wait(1.0)
    desk.answers()
    assert (answers, again, desk.deployments) == ([Done()], [Done()], {})


def test_deleting_ends_an_import_that_is_under_way(desk: Desk) -> None:
    deploying = desk.deploy(picture.spec("m"))
    inspected(desk)
    poll = desk.only(PollImport)
    answers = desk.delete("m")
    desk.answers()
    assert code_of(deploying) is Code.CONFLICT
    assert answers == [Done()]
    desk.tell(ImportMoved("m", poll.operation, Progress(phase="importing")))
    assert desk.take(PollImport) == []
    assert desk.deployments == {}


def test_a_restarted_scheduler_goes_on_with_imports_and_deletions(desk: Desk) -> None:
    desk.deploy(picture.spec("m"))
    inspected(desk)
    gone = picture.deployment(picture.spec("x"), picture.checkpoint(), DeploymentState.DELETING)
    again = Desk(servers=desk.servers, workers=desk.workers, deployments=desk.deployments, now=5000.0)
    again.add(gone).start()
    assert sorted(again.deployments) == ["m"]
    answers = again.deploy(picture.spec("m"))
    again.imported(picture.checkpoint())
    again.answers()
    assert isinstance(answers[0], Deployed)


def test_a_record_that_the_registry_has_lost_is_written_again(desk: Desk) -> None:
    ready(desk)
    record = desk.deployments.pop("m")
    desk.wait(1.1)
    assert desk.deployments == {"m": record}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": "a//b"}, "name"),
        ({"name": "../up"}, "name"),
        ({"min_replicas": -1}, "min_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas"),
        ({"target_concurrency": 0}, "target_concurrency"),
        ({"keep_alive_s": -1.0}, "keep_alive_s"),
        ({"keep_alive_s": float("nan")}, "keep_alive_s"),
        ({"max_context_tokens": 0}, "max_context_tokens"),
        ({"queue_limit": 0}, "queue_limit"),
        ({"url": "relative/path"}, "source"),
        ({"url": "ftp://host/path"}, "source"),
        ({"url": "file://other/path"}, "source"),
        ({"url": "https://user:secret@host/m"}, "source"),
        ({"url": "s3://user:sec/ret@bucket/m"}, "source"),
        ({"url": "https://host/m?signature=secret"}, "source"),
    ],
)
def test_bad_specs_are_refused_with_the_field(fields: dict[str, object], param: str) -> None:
    failure = validate(picture.spec(**fields))  # type: ignore[arg-type]
    assert failure is not None
    assert (failure.code, failure.param) == (Code.INVALID_REQUEST, param)


@pytest.mark.parametrize(
    "url",
    [
        "/models/m",
        "hf:org/name",
        "s3://b/m",
        "gs://b/m",
        "az://c/m",
        "https://h/m",
        "http://h/m",
        "file:///m@1",
        "/m@1",
    ],
)
def test_a_source_of_any_kind_that_stores_open_is_taken(url: str) -> None:
    assert validate(picture.spec("m", url=url)) is None


def test_the_revision_depends_on_what_replicas_depend_on() -> None:
    base = revision_of(picture.spec("m"))
    assert revision_of(picture.spec("m", keep_alive_s=1.0, max_replicas=9, queue_limit=5)) == base
    others = [{"url": "/x"}, {"target_concurrency": 2}, {"max_context_tokens": 8}]
    assert len({base, *(revision_of(picture.spec("m", **one)) for one in others)}) == 4  # type: ignore[arg-type]
