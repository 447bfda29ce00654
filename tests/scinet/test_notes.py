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


def test_store_that_is_gone_is_no_answer(line: notes._Line) -> None:
    def broken(_: Any) -> int:
        raise RuntimeError("Connection reset by peer")

    with pytest.raises(ConnectionError):
        line.ask(broken)
    assert line.ask(lambda _: 7) == 7


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
