"""A call to a store that does not answer ends at its deadline, and those after it at once."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from lightning_comm.transport import group_ends
from lightning_comm.transport.store_client import StoreClient, StoreLostError, connect_without_clone


class Stuck:
    """A store that answers once it is let."""

    def __init__(self):
        self.lets, self.calls = threading.Event(), []

    def clone(self):
        return self

    def check(self, keys):
        self.calls.append(keys)
        assert self.lets.wait(60)
        return True


def test_answers_are_those_of_the_store():
    store = dist.HashStore()
    client = StoreClient(store, 60.0)
    assert client.check(["a"]) is False
    client.set("a", "b")
    assert client.get("a") == store.get("a") == b"b"
    assert client.compare_set("a", "b", "c") == b"c"
    assert client.silent_since_s is None
    assert not client.connection_lost
    client.close()


def test_where_stores_cannot_be_cloned_clients_have_own_connections_and_share_keys_of_one_attempt(monkeypatch):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.PrefixStore("outer", dist.PrefixStore("inner", host))
    one, other = connect_without_clone(store), connect_without_clone(store)
    one.set("a", "b")
    waits = threading.Thread(target=one.get, args=("late",))
    waits.start()
    assert other.get("a") == b"b"  # also if `one` is waiting by now
    assert host.check(["a"]) is False
    other.set("late", "c")
    waits.join(60)
    assert not waits.is_alive(), "a call that waits holds up its own connection alone"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert connect_without_clone(store).check(["a"]) is False
    in_memory = dist.HashStore()
    assert connect_without_clone(in_memory) is in_memory


def test_a_call_that_gets_no_answer_ends_at_the_time_out_and_later_ones_at_once():
    store = Stuck()
    client = StoreClient(store, 0.2)
    with pytest.raises(StoreLostError, match="has not answered for 0 s"):
        client.check(["a"])
    assert client.silent_since_s is not None
    with pytest.raises(StoreLostError, match="has not answered"):
        client.get("b")
    assert store.calls == [["a"]]
    store.lets.set()


def test_a_call_that_was_given_up_early_does_not_keep_others_from_an_answer():
    store = Stuck()
    client = StoreClient(store, 60.0)
    with pytest.raises(StoreLostError):
        client.check(["a"], within_s=0.05)
    threading.Timer(0.1, store.lets.set).start()
    assert client.check(["b"])
    assert store.calls == [["a"], ["b"]]


@pytest.mark.parametrize("failed", [False, True])
def test_a_call_that_never_ends_is_left_behind_with_whether_the_run_has_failed(failed, monkeypatch):
    monkeypatch.setattr(group_ends, "_left_behind", {})
    monkeypatch.setattr(group_ends, "_noting", [True])  # `sys.exit` stays as it is
    store = Stuck()
    client = StoreClient(store, 0.1)
    with pytest.raises(StoreLostError):
        client.check(["a"])
    client.close(failed=failed)
    assert list(group_ends._left_behind.values()) == [failed]
    store.lets.set()


def _ends(status, uncaught, failed):
    group_ends.note_exit_status()
    group_ends.leave_behind(threading.main_thread(), failed=failed)
    if status is not None:
        with pytest.raises(SystemExit):
            sys.exit(status)
    if uncaught:
        sys.last_value = ValueError()
    group_ends._end_without_shutting_down()


@pytest.mark.parametrize(
    ("status", "uncaught", "failed", "ends_with"),
    [
        (3, False, True, 3),
        (3, False, False, 3),
        (0, False, True, 0),
        ("a text", False, False, 1),
        (None, False, True, 1),
        (None, False, False, 0),
        (0, True, True, 1),
        (None, True, False, 1),
    ],
)
def test_a_process_that_leaves_a_thread_behind_ends_with_the_status_of_its_script(status, uncaught, failed, ends_with):
    process = multiprocessing.get_context("fork").Process(target=_ends, args=(status, uncaught, failed))
    process.start()
    process.join(60)
    assert process.exitcode == ends_with


def _host(says):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    says.send(store.port)
    time.sleep(600)


@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_a_host_that_is_stopped_or_killed_holds_nobody_up(sent):
    """With torch alone a call to a stopped host never returns, whatever the time-out of the store."""
    hears, says = multiprocessing.get_context("fork").Pipe()
    host = multiprocessing.get_context("fork").Process(target=_host, args=(says,), daemon=True)
    host.start()
    store = dist.TCPStore("127.0.0.1", hears.recv(), is_master=False, timeout=timedelta(seconds=30))
    client = StoreClient(store, 1.0)
    try:
        assert client.check(["a"]) is False
        os.kill(host.pid, sent)
        if sent == signal.SIGSTOP:
            os.waitpid(host.pid, os.WUNTRACED)  # until it has stopped
        else:
            host.join()
        with pytest.raises(StoreLostError):
            client.check(["a"])
        assert client.connection_lost == (sent == signal.SIGKILL)
    finally:
        host.kill()
        host.join()
