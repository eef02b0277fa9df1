"""When processes stop together, and what is said when nothing moves."""

import json
import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from jaxlm import liveness
from jaxlm.liveness import Stall, Stop, Watch


def test_alone_a_signal_stops_after_the_step():
    stop = Stop()
    stop.begin(3)
    assert not stop.due(4)
    stop.tell(15)
    assert stop.due(5)


@given(ahead=st.lists(st.integers(0, 5), min_size=2, max_size=6))
def test_all_stop_after_the_same_step_however_far_ahead(ahead):
    stops = [Stop(alone=False) for _ in ahead]
    for stop, steps in zip(stops, ahead, strict=True):
        stop.begin(10)
        for step in range(11, 11 + steps):
            assert not stop.due(step)
    begun = [stop.freeze(15) for stop in stops]
    assert begun == [11 + steps for steps in ahead]
    for stop in stops:
        stop.settle(max(begun))
    for stop, step in zip(stops, begun, strict=True):
        while not stop.due(step):
            step += 1
        assert step == max(begun)


def test_a_frozen_process_begins_no_step():
    stop, ended = Stop(alone=False), []
    assert stop.freeze(15) is None  # nothing to stop before the loop
    stop.begin(0)
    assert stop.freeze(15) == 1
    thread = threading.Thread(target=lambda: ended.append(stop.due(1)))
    thread.start()
    time.sleep(0.05)
    assert not ended
    stop.settle(1)
    thread.join(5)
    assert ended == [True] and stop.signal == 15


class Store:
    """The coordination service's store, here."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_is_told_and_all_stop(monkeypatch):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    store, stops = Store(), [Stop(alone=False) for _ in range(3)]
    for step, stop in enumerate(stops):
        stop.begin(step)
    watches = [Watch(store, i, ["host"] * 3, stop) for i, stop in enumerate(stops)]
    stops[1].tell(10)
    wait_until(lambda: all(stop._last == 3 for stop in stops))
    assert [stop.signal for stop in stops] == [10] * 3
    for watch in watches:
        watch.close()


def test_who_is_silent_is_named_and_the_first_failure_counts(monkeypatch, capfd):
    monkeypatch.setattr(liveness, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(liveness, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(liveness, "LOST_SECONDS", 0.5)
    left = []
    monkeypatch.setattr(liveness.os, "_exit", lambda code: left.append(code) or exit())
    store = Store()
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    watch = Watch(store, 0, ["here", "there"], Stop(alone=False))
    wait_until(lambda: left)
    watch.close()
    failure = json.loads(store.values["jaxlm/watch/news/failure"])
    assert failure["text"].startswith("process 1 on there went away")
    assert left == [liveness.EXIT_LOST]
    assert "error: process 1 on there went away" in capfd.readouterr().err
    assert not watch.publish({"text": "later"})


def test_a_stall_prints_every_stack_once(capfd):
    stall = Stall(0.3 / 60, " in process 2 on host")
    time.sleep(0.2)
    stall.step()
    time.sleep(0.2)
    assert capfd.readouterr().err == ""
    time.sleep(0.6)
    stall.close()
    text = capfd.readouterr().err
    assert text.startswith("no step finished for 0.005 minutes in process 2 on host")
    assert text.count("no step finished") == 1
    assert "test_a_stall_prints_every_stack_once" in text and "_look_on" in text


def test_no_minutes_no_watch():
    before = threading.active_count()
    Stall(None).close()
    assert threading.active_count() == before
