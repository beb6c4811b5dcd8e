"""The service under good and bad requests at once, its model reloaded and its worker killed on the way: no wrong answer,
no hang, flat memory.

Some seconds; LONG=1 bash tests/faults.sh: thirty minutes.
"""

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import socket
import statistics
import threading
import time

import pytest
from conftest import FAULTS, Service, settings_of

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import data
import serving_load
from common import batching, engine, tokenization
import numpy as np
from test_serving_input import BAD


SECONDS = {None: 15, "short": 20, "long": 1800}[FAULTS]
PATH = "/ppminilm/prediction"
CLIENTS, RELOADS = 4, 20 if FAULTS == "long" else 2


def ask(connection, body):
    """(HTTP status, answer) over a connection that stays open."""
    connection.request("POST", PATH, body if isinstance(body, bytes) else json.dumps(body))
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


class Soak:
    """Clients that ask until ``stop`` is set, and what came of it."""

    def __init__(self, port, examples, logits, tolerance):
        self.port, self.examples, self.logits, self.tolerance = port, examples, logits, tolerance
        self.right = self.refused = self.left = self.unavailable = 0
        self.lost = []  # when a request, good or bad, got no answer
        self.wrong, self.slowest, self.lock, self.stop = [], 0.0, threading.Lock(), threading.Event()

    def one(self, connection, rng):
        """One request: mostly a good one, else one that is to be refused, or a client that leaves without the answer."""
        kind = rng.random()
        if kind < 0.7:
            number = rng.randrange(len(self.examples))
            status, answer = ask(connection, {"text": self.examples[number].text})
            if status == 200:
                close = np.abs(np.subtract(answer["logits"][0], self.logits[number])).max() <= self.tolerance
                return "right" if close else f"{number}: {answer}"
            return "unavailable" if status in (503, 504) else f"{number}: {status} {answer}"
        if kind < 0.95:
            what, body, expected, err_no, words = rng.choice(BAD)
            # A connection of its own: the server closes one with a body that it does not read to the end.
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as own:
                status, answer = ask(own, body)
            if status in (503, 504):
                return "unavailable"
            said = (status, answer["err_no"]) == (expected, err_no) and words in answer["err_msg"]
            return "refused" if said and not answer.get("value") else f"{what}: {status} {answer}"
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as client:
            whole = b'{"text": "\xe4\xb8\x80"}'
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
            client.sendall((head + whole)[: rng.randrange(1, len(head + whole) + 1)])
        return "left"

    def client(self, seed):
        rng, connection = random.Random(seed), None
        while not self.stop.is_set():
            connection = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            started = time.monotonic()
            try:
                came = self.one(connection, rng)
            except (OSError, http.client.HTTPException) as error:
                connection, came = None, "hang" if isinstance(error, TimeoutError) else "lost"
            with self.lock:
                self.slowest = max(self.slowest, time.monotonic() - started)
                if came == "lost":
                    self.lost.append(started)
                elif came in ("right", "refused", "left", "unavailable"):
                    setattr(self, came, getattr(self, came) + 1)
                else:
                    self.wrong.append(came)
            if came in ("unavailable", "lost"):
                time.sleep(0.05)


def resident(process):
    """Resident memory of a process in MB, or None if it is gone."""
    try:
        with open(f"/proc/{process}/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def growth(samples):
    """Of memory: the median of the last third over that of the first third, less 1."""
    third = max(1, len(samples) // 3)
    return statistics.median(samples[-third:]) / statistics.median(samples[:third]) - 1


def test_soaked(models, workspace, tmp_path, fault):
    directory, name = models["int8"]
    tokenizer = tokenization.load_tokenizer(str(directory))
    examples = data.read_split(
        data.get_task("topics", str(workspace / "data")), "dev", str(workspace / "data")
    ).examples
    features = batching.convert(examples, tokenizer, 64)
    logits = engine.Engine(str(directory / name), "cpu", "int8").predict(features, pad_id=tokenizer.pad_id)
    assert (
        serving_load.confusable(logits, serving_load.TOLERANCE["int8"]) < 0.05
    )  # or a wrong answer would pass for right

    settings = settings_of(max_body_bytes=20_000, max_texts=50)
    with Service(tmp_path, directory, settings=settings) as service:
        soak = Soak(service.http, examples, logits, serving_load.TOLERANCE["int8"])
        threads = [threading.Thread(target=soak.client, args=(seed,), daemon=True) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        started, killed, of_front, of_worker = time.monotonic(), [], [], []
        # In the first half the worker is killed now and then; in the second its memory is watched, each half long enough.
        planned = [SECONDS * share for share in ((0.1, 0.2, 0.3, 0.4) if FAULTS == "long" else (0.2,))]
        # Its model is reloaded all the time, every minute and a half in the long run.
        reloads = [SECONDS * (number + 0.5) / RELOADS for number in range(RELOADS)]
        asked = 0
        for _ in itertools.count():
            time.sleep(min(5, SECONDS / 30))
            elapsed = time.monotonic() - started
            if elapsed > SECONDS:
                break
            if len(killed) < len(planned) and elapsed > planned[len(killed)]:
                killed.append(time.monotonic())
                os.kill(service.worker(), signal.SIGKILL)
            if asked < len(reloads) and elapsed > reloads[asked]:
                asked += 1
                os.kill(service.process.pid, signal.SIGHUP)
            of_front.append(resident(service.process.pid))
            if elapsed > SECONDS / 2:
                of_worker.append(resident(service.worker()))
        soak.stop.set()
        for thread in threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"
        answered = service.post({"text": "一丁七"})
        assert answered[0] == 200 and answered[1]["err_no"] == 0
        lines = service.stderr.read_text().splitlines()
        reloaded = len([line for line in lines if line.startswith("web_service.py: reloaded, ")])
        restarts = service.stderr.read_text().count("starting it anew")
    assert not soak.wrong, soak.wrong[:5]
    assert restarts == len(killed) == len(planned)
    # But those that were asked for while the worker was down, which its successor need not do.
    assert asked == RELOADS and asked - len(killed) <= reloaded <= asked
    # Nothing is lost but while the worker is down: what it was answering, and what came before it was back.
    astray = [when for when in soak.lost if not any(down - 1 < when < down + 30 for down in killed)]
    assert not astray, [when - started for when in astray]
    assert soak.right > 10 * SECONDS and soak.refused > 3 * SECONDS and soak.left > SECONDS / 3
    assert soak.slowest < 60
    grown = {"front": growth(of_front), "worker": growth(of_worker)}
    assert max(grown.values()) < 0.05, (grown, of_front, of_worker)
    fault(f"service soaked for {SECONDS / 60:g} minutes", f"{CLIENTS} clients at once, 70 % good requests, 25 % of {len(BAD)} "
          f"kinds of bad ones, 5 % that leave before the answer; worker killed {len(killed)} times, model reloaded {reloaded} times; INT8, a small model",
          soak.right + soak.refused + soak.left + soak.unavailable + len(soak.lost),
          f"{soak.right} right answers, 0 wrong; {soak.refused} refused as documented; {soak.unavailable} answered 503 or 504, "
          f"{len(soak.lost)} not answered, all within 30 s of a kill; slowest {soak.slowest:.1f} s; memory in the end "
          f"{of_front[-1]:.0f} MB (front, {grown['front']:+.1%}), {of_worker[-1]:.0f} MB (worker, {grown['worker']:+.1%})")  # fmt: skip
