"""The way to the store: in time or not at all, and open again once it answers. Between processes: tests/system."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from scinet import notes
from scinet.distributed import Ranks


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> notes._Line:
    monkeypatch.setattr(notes, "_ANSWER_S", 0.2)
    monkeypatch.setattr(notes.dist.distributed_c10d, "_get_default_store", lambda: None)
    return notes._Line()


def test_question_is_given_up_and_nobody_waits_behind_it_when_the_store_is_silent(line: notes._Line) -> None:
    answers = threading.Event()
    with pytest.raises(ConnectionError):
        line.ask(lambda _: answers.wait(60))
    started = time.monotonic()
    for _ in range(500):
        with pytest.raises(ConnectionError):
            line.ask(lambda _: 1)
    assert time.monotonic() - started < 500 * 0.2 / 2, "a rank may have a question for each of hundreds of others"
    answers.set()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert line.ask(lambda _: 7) == 7
            return
        except ConnectionError:
            time.sleep(0.01)
    pytest.fail("the store answers again, but is not asked")


@pytest.mark.parametrize(
    "error", [RuntimeError("Connection reset by peer"), ValueError("Default process group has not been initialized")]
)
def test_store_that_is_gone_is_no_answer(line: notes._Line, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> int:
        raise error

    unheard: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", unheard.append)
    with pytest.raises(ConnectionError):
        line.ask(broken)
    assert line.ask(lambda _: 7) == 7
    assert not unheard, "the thread that asks says nothing of its own"


def test_questions_of_several_threads_are_all_answered(line: notes._Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_ANSWER_S", 60.0)
    got: list[int] = []

    def ask(number: int) -> None:
        got.extend(line.ask(lambda _: number) for _ in range(50))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted([0, 1, 2, 3] * 50)


def test_texts_are_read_together_and_those_that_are_not_there_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch._C._distributed_c10d.HashStore()
    monkeypatch.setattr(notes.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(notes.dist, "is_initialized", lambda: True)
    board = notes.Notes(Ranks(0, 3, torch.device("cpu")))
    assert board.get_many(["0", "1"]) == {}
    board.put("1", "é\n")
    assert board.get_many(["0", "1", "2"]) == {"1": "é\n"}
    board.put("0", "")
    assert board.get_many(["0", "1"]) == {"0": "", "1": "é\n"}
    assert board.get_many([]) == {}


class _Ranks:
    """Several ranks of this process, one at a time, with one store between them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self._patch = monkeypatch
        store = torch._C._distributed_c10d.HashStore()
        monkeypatch.setattr(notes.dist.distributed_c10d, "_get_default_store", lambda: store)
        monkeypatch.setattr(notes.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(notes.dist, "get_world_size", lambda: size)
        monkeypatch.setattr(notes, "_ANSWER_S", 0.5)

    def be(self, rank: int) -> notes.Failures:
        self._patch.setattr(notes.dist, "get_rank", lambda: rank)
        self._patch.setenv("LOCAL_RANK", str(rank))
        return notes.Failures()


def test_first_rank_that_fails_speaks_and_the_others_learn_whether_starting_again_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = _Ranks(monkeypatch, 3)
    assert [ranks.be(rank).elsewhere() for rank in range(3)] == [0, 0, 0]
    assert ranks.be(2).tell(142)
    assert [ranks.be(rank).elsewhere() for rank in range(2)] == [142, 142]
    assert not ranks.be(1).tell(1)
    listening = ranks.be(0)
    assert listening.elsewhere() == 1, "what a restart repeats outweighs what it cures"

    def gone() -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(notes.dist.distributed_c10d, "_get_default_store", gone)
    assert listening.elsewhere() == 1, "once heard it holds"
    assert ranks.be(0).elsewhere() == 0


@pytest.mark.parametrize(("status", "kind"), [(1, 1), (2, 1), (127, 1), (128, 142), (143, 142)])
def test_statuses_from_128_on_are_those_that_starting_again_cures(
    monkeypatch: pytest.MonkeyPatch, status: int, kind: int
) -> None:
    ranks = _Ranks(monkeypatch, 2)
    ranks.be(1).tell(status)
    assert ranks.be(0).elsewhere() == kind


def test_one_rank_of_a_host_speaks_when_rank_0_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _Ranks(monkeypatch, 4)

    def gone() -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(notes.dist.distributed_c10d, "_get_default_store", gone)
    assert [ranks.be(rank).tell(142) for rank in range(3)] == [False, True, False]
    other_host = ranks.be(3)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert other_host.tell(142)


def test_rank_alone_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _Ranks(monkeypatch, 1)
    assert ranks.be(0).tell(1)
    assert ranks.be(0).elsewhere() == 0


def test_only_the_first_to_ask_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _Ranks(monkeypatch, 2)
    board = notes.Notes(Ranks(0, 2, torch.device("cpu")))
    assert [board.is_first("hang"), board.is_first("hang"), board.is_first("other")] == [True, False, True]
    assert board.get("beat/1") is None
    board.put("beat/1", "x")
    assert board.get("beat/1") == "x"
    assert board.can_be_read()
    assert notes.Notes(Ranks(0, 2, torch.device("cpu"))).get("beat/1") is None, "another board"
