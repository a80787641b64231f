"""How ranks meet, agree, and tell who failed first."""

import threading
import uuid
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llamatrain.distributed import Failure, World, meet
from llamatrain.errors import ConfigError, DataError, DistributedError
from llamatrain.process import Process, attempt_id, this_process
from tests.ranks import on_ranks

PATIENCE = timedelta(seconds=20)


@pytest.fixture
def agent_store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The key-value store that torchrun's agent keeps while its workers come and go."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def meet_all(size: int, *, later: float = 0.0) -> list[dist.Store]:
    """All ranks meet, each in a thread of its own; the others come `later` seconds after rank 0."""
    stores: list[dist.Store | None] = [None] * size

    def come(rank: int) -> None:
        if rank:
            threading.Event().wait(later)
        stores[rank] = meet(Process(rank, size, rank, size), timeout=PATIENCE)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE.total_seconds())
    found = [store for store in stores if store is not None]
    assert len(found) == size
    return found


def test_ranks_meet_under_one_name(agent_store: dist.TCPStore) -> None:
    first, *others = meet_all(4)
    first.set("key", "value")
    assert [store.get("key") for store in others] == [b"value"] * 3


def test_what_an_attempt_before_left_in_the_store_is_not_seen(agent_store: dist.TCPStore) -> None:
    meet_all(3)[0].set("address", "of a dead process")
    again = meet_all(3)
    assert not again[1].check(["address"])


def test_words_of_dead_ranks_do_not_count_as_arrivals(agent_store: dist.TCPStore) -> None:
    for rank in (1, 2):  # they had announced themselves and died before they could read the answer
        agent_store.set(f"llamatrain/word/{rank}", uuid.uuid4().hex)
    first, *others = meet_all(3, later=0.5)
    first.set("key", "value")
    assert [store.get("key") for store in others] == [b"value"] * 2


def test_ranks_that_do_not_come_are_named(agent_store: dist.TCPStore) -> None:
    with pytest.raises(DistributedError, match=r"3 of 4 processes did not come within 0 s: rank 1, 2, 3"):
        meet(Process(0, 4), timeout=timedelta(seconds=0.2))
    with pytest.raises(DistributedError, match=r"rank 1 on .* cannot meet the others at 127\.0\.0\.1:\d+ within 0 s"):
        meet(Process(1, 4), timeout=timedelta(seconds=0.2))


def test_a_process_alone_agrees_with_itself() -> None:
    world = World()
    assert world.leads
    assert world.gather("x") == ["x"] == world.gather_to_leader("x")
    assert world.decide(lambda: 3) == 3
    assert world.sum(torch.tensor(2.0)).item() == 2
    with pytest.raises(DataError, match="mine"), world.together():
        raise DataError("mine")
    world.check_same("configuration", {"a": 1})
    world.leave()


def agreements(world: World) -> list[object]:
    found: list[object] = [
        world.gather(world.rank * 10),
        world.gather_to_leader(world.rank),
        world.decide(lambda: f"rank {world.rank} decides"),
        world.sum(torch.tensor(float(world.rank))).item(),
    ]
    try:
        with world.together():
            if world.rank > 1:
                raise DataError(f"rank {world.rank} cannot read")
    except DataError as error:
        found.append(str(error))
    try:
        world.decide(lambda: this_must_not_be_a_configuration())
    except ConfigError as error:
        found.append(str(error))
    try:
        world.check_same("configuration", {"lr": 1 if world.rank < 3 else 2, "seed": 0})
    except ConfigError as error:
        found.append(str(error).partition(" has ")[2])
    return found


def this_must_not_be_a_configuration() -> None:
    raise ConfigError("refused by rank 0")


def test_ranks_decide_and_fail_together() -> None:
    found = on_ranks(4, agreements)
    for rank, answers in enumerate(found):
        assert answers == [
            [0, 10, 20, 30],
            [0, 1, 2, 3] if rank == 0 else None,
            "rank 0 decides",
            6.0,
            "rank 2 cannot read",
            "refused by rank 0",
            "another configuration: lr is 2 there, 1 on rank 0; start all ranks with the same command",
        ]


def blamed(world: World) -> tuple[int, int, str]:
    world.gather(None)
    if world.rank != 2:  # rank 2 fails first; the others notice that it is gone
        threading.Event().wait(0.5)
    error = DataError("planted") if world.rank == 2 else RuntimeError("Connection closed by peer")
    failure = world.first_failure(error)
    return failure.rank, failure.exit_code, failure.message


def test_the_first_failure_is_everybody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_ranks(3, blamed) == [(2, 2, "planted")] * 3


def test_a_broken_pipe_of_one_s_own_is_nobody_else_s_death() -> None:
    assert not Failure.of(BrokenPipeError(32, "Broken pipe"), rank=0).another_is_gone
    assert Failure.of(RuntimeError("Connection closed by peer [::1]:1. Check the logs"), rank=0).another_is_gone


# The launcher's variables


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_JOB_ID", "LLAMATRAIN_ATTEMPT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_launcher_the_process_is_alone(bare: pytest.MonkeyPatch) -> None:
    assert this_process() == Process(0, 1, 0, 1)


def test_torchrun_s_variables_are_read(bare: pytest.MonkeyPatch) -> None:
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**values, "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        bare.setenv(name, value)
    assert this_process() == Process(5, 8, 1, 4)
    bare.setenv("RANK", "8")
    with pytest.raises(ConfigError, match="RANK=8 is not below WORLD_SIZE=8"):
        this_process()
    bare.setenv("RANK", "five")
    with pytest.raises(ConfigError, match="not numbers"):
        this_process()
    bare.delenv("RANK")
    with pytest.raises(ConfigError, match="WORLD_SIZE=8 is set and RANK is not: start with torchrun"):
        this_process()


def test_workers_of_one_torchrun_are_one_attempt(bare: pytest.MonkeyPatch) -> None:
    alone = attempt_id()
    bare.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = attempt_id()
    bare.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert first == attempt_id() != alone
    assert first.startswith("torchrun-")
