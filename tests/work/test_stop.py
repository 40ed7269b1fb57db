"""Signals: noted, handed on, and the second one ends the process."""

import signal
import subprocess
import sys
import time

import pytest

PROGRAM = """
import os, signal, subprocess, sys, time
from nightschool.work.stop import Stop
with Stop() as stop:
    if sys.argv[1] == "child":
        stop.child = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
    print("ready", flush=True)
    stop.wait(60)
    print(stop.reason, flush=True)
    if stop.child is not None:
        print(stop.child.wait(60), flush=True)
    else:
        time.sleep(60)
"""
STUBBORN = """
import signal, sys, time
count = 0
def on_signal(number, frame):
    global count
    count += 1
    if count == 2:
        sys.exit(3)
signal.signal(signal.SIGTERM, on_signal)
print("child ready", flush=True)
while True:
    time.sleep(0.05)
"""


def start(*arguments):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in arguments]
    assert "ready\n" in lines
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_process_without_a_child_at_once(number):
    process = start("alone")
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    process.send_signal(number)
    assert process.wait(30) == 130
    process.stdout.close()


def test_every_signal_is_handed_to_the_child():
    process = start("child", STUBBORN)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT\n"
    time.sleep(0.3)  # two signals of one kind that come at once are one
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "3\n"
    assert process.wait(30) == 0
    process.stdout.close()
