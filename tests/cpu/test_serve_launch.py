"""Starting, watching and stopping a process group, with a stand-in for SGLang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from sglang_trinv.serve.command import Command
from sglang_trinv.serve.config import ServeConfig, ServeError, free_port
from sglang_trinv.serve.launch import Server, stop_on_signals

# A main process that answers /health, a worker with SGLang's title, one that leaves the group.
FAKE = textwrap.dedent("""
    import http.server, os, signal, subprocess, sys, time
    if len(sys.argv) > 2:
        import setproctitle
        setproctitle.setproctitle("sglang::" + sys.argv[2])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    print("starting", flush=True)
    subprocess.Popen([sys.executable, __file__, "0", "scheduler"])
    subprocess.Popen([sys.executable, __file__, "0", "other"], start_new_session=True)
    if sys.argv[1] == "die":
        time.sleep(0.5)
        sys.exit("boom: no such weights")
    time.sleep(1)
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
        def log_message(self, *args):
            print("asked", self.path, flush=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
""")


@pytest.fixture
def make_server(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = []

    def make(argument: str = "") -> Server:
        config = ServeConfig(device="cpu", port=free_port())
        server = Server(config, tmp_path)
        argv = (sys.executable, str(script), argument or str(config.port))
        server.command = Command(argv, dict(os.environ))
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


def gone(pids, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_healthy_then_nothing_left(make_server, monkeypatch):
    monkeypatch.setattr("sglang_trinv.serve.launch.STOP_TIMEOUT_S", 0.5)
    said = []
    with make_server() as server:
        seconds = server.wait_healthy(timeout_s=30, progress=said.append)
        pids = [process.pid for process in server.processes()]
        assert 0 < seconds < 30
        assert len(pids) == 3
        assert list(server.workers.values()) == ["sglang::scheduler"]
    assert gone(pids)
    assert "starting" in said


def test_server_that_dies_while_starting(make_server):
    server = make_server("die")
    server.start()
    with pytest.raises(
        ServeError, match=r"(?s)ended with status 1.*boom: no such weights.*whole log"
    ):
        server.wait_healthy(timeout_s=30)
    pids = [process.pid for process in server.processes()]
    server.stop()
    assert gone(pids)


def test_the_cause_is_shown_though_it_is_far_above(make_server):
    server = make_server()
    cause = "ValueError: Unsupported dtype torch.float64"
    server.log.write_text("\n".join(["Traceback:", "  raise x", cause, *["line"] * 50, "the end"]))
    tail = server.tail().splitlines()
    assert tail[0] == cause
    assert tail[-2] == "the end"
    assert len(tail) == 1 + 15 + 1


def test_server_that_takes_too_long(make_server):
    server = make_server()
    server.start()
    with pytest.raises(ServeError, match="not healthy after"):
        server.wait_healthy(timeout_s=0)


def test_death_of_a_worker_ends_the_wait(make_server):
    lines = []
    with make_server() as server:
        server.wait_healthy(timeout_s=30)
        os.kill(next(iter(server.workers)), signal.SIGKILL)
        with pytest.raises(ServeError, match=r"sglang::scheduler \(process \d+\) died"):
            server.wait(lines.append)
        pids = [process.pid for process in server.processes()]
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_killed_launcher_leaves_no_server(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    port = free_port()
    launcher = textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from sglang_trinv.serve.command import Command
        from sglang_trinv.serve.config import ServeConfig
        from sglang_trinv.serve.launch import Server
        server = Server(ServeConfig(device="cpu", port={port}), Path({str(tmp_path)!r}))
        argv = (sys.executable, {str(tmp_path / "fake.py")!r}, "{port}")
        server.command = Command(argv, dict(os.environ))
        server.start()
        print(server.process.pid, flush=True)
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    main = int(process.stdout.readline())
    deadline = time.monotonic() + 10
    children = []
    while len(children) < 2 and time.monotonic() < deadline:
        children = [child.pid for child in psutil.Process(main).children()]
    assert alive(main)
    process.kill()
    process.wait()
    assert gone([main])
    for pid in children:  # the stand-in's own; SGLang's ask the kernel for the same
        os.kill(pid, signal.SIGKILL)


def test_signals_become_an_interrupt():
    with pytest.raises(KeyboardInterrupt), stop_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
