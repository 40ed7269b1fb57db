"""Engines take turns in the order in which they asked."""

import threading

import pytest
from live_server import eventually

from nightschool.engine.turns import Turns


def test_one_at_a_time():
    turns, inside, most = Turns(), 0, 0

    def work():
        nonlocal inside, most
        for _ in range(200):
            with turns:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (inside, most) == (0, 1)


def test_who_asked_first_is_first():
    turns, order, threads = Turns(), [], []

    def work(number):
        with turns:
            order.append(number)

    with turns:
        for number in range(5):
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            eventually(lambda waiting=number + 1: len(turns._waiting) == waiting)
    for thread in threads:
        thread.join(30)
    assert order == [0, 1, 2, 3, 4]


def test_an_error_inside_gives_the_turn_back():
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    with turns:
        pass
