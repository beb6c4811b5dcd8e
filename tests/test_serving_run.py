"""How the service is run: the systemd unit and the Dockerfile, step by step in a clean directory, and --wait-ready, which
ends when there is nothing left to wait for.

IMAGE=1 also makes the environment as the Dockerfile does (minutes). Docker itself and systemd are not needed; where
systemd-analyze is installed, it checks the unit.
"""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, Service

pytest.importorskip("paddle_serving_server", reason="needs Paddle Serving: bash setup_env.sh --serving")
import rpc_client
import yaml
from serving_load import free_port
from test_serving_life import processes, run, until

SERVING = os.path.join(ROOT, "deploy/serving")


def steps():
    """[(instruction, its words or its text)] of the Dockerfile."""
    found = []
    for line in open(os.path.join(SERVING, "Dockerfile"), encoding="utf-8"):
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.strip().partition(" ")
            found.append((name, rest))
    return found


class Machine:
    """A directory in the place of / ; ``path`` says where a path of the machine lies in it."""

    def __init__(self, directory):
        self.directory = directory

    def path(self, path, base="/opt/ppminilm"):
        return os.path.normpath(f"{self.directory}{os.path.join(base, path)}")

    def words(self, words):
        """A command with the paths of the machine."""
        return [
            self.path(word) if word.startswith(("/opt", "/etc", "/var", "/model", ".venv")) else word for word in words
        ]

    def copy(self, source, target):
        """As COPY does, what is tracked or new in the project alone."""
        names = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", source],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\n")[:-1]  # fmt: skip
        assert names, f"COPY {source}: nothing there"
        for name in names:
            inside = os.path.relpath(name, source)
            place = (
                self.path(target)
                if not target.endswith("/")
                else os.path.join(self.path(target), os.path.basename(name))
            )
            place = place if inside == "." else os.path.join(self.path(target), inside)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), place)

    def use_this_environment(self):
        os.makedirs(self.path(".venv/bin"), exist_ok=True)
        with open(self.path(".venv/bin/python"), "w") as file:
            file.write(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        os.chmod(self.path(".venv/bin/python"), 0o755)


@pytest.fixture
def model(models):
    return models["int8"][0]


def test_the_dockerfile_step_by_step(model, tmp_path):
    machine, commands, elsewhere = Machine(tmp_path), {}, []
    for name, rest in steps():
        if name == "COPY":
            machine.copy(*rest.split())
        elif name == "RUN" and "setup_env.sh" in rest:
            if os.environ.get("IMAGE", "0") == "0":
                machine.use_this_environment()
            else:
                subprocess.run(["sh", "-c", rest], cwd=machine.path("."), check=True)
        elif name in ("ENTRYPOINT", "HEALTHCHECK"):
            commands[name] = machine.words(json.loads(rest[rest.index("[") :]))
        else:
            elsewhere.append((name, rest.split()[0]))
    # What only an image has: its base, its user, its packages.
    assert elsewhere == [("FROM", "python:3.11-slim-bookworm"), ("RUN", "apt-get"), ("WORKDIR", "/opt/ppminilm"),
                         ("RUN", "useradd"), ("USER", "ppminilm"), ("EXPOSE", "18083")]  # fmt: skip
    os.makedirs(machine.path("/var/log/ppminilm"))
    shutil.copytree(model, machine.path("/model"))
    config = machine.path("/etc/ppminilm/config.yml")
    settings = yaml.safe_load(open(config, encoding="utf-8"))
    ports = {"http_port": free_port(), "rpc_port": free_port()}
    with open(config, "w") as file:
        json.dump({**settings, **ports}, file)
    with open(tmp_path / "output", "wb") as output:
        service = subprocess.Popen(commands["ENTRYPOINT"], cwd=machine.path("."), stdout=output, stderr=output)
    try:
        checked = until_ready(commands["HEALTHCHECK"], machine.path("."))
        assert checked == 0, (tmp_path / "output").read_text()
        client = [machine.path(".venv/bin/python"), "deploy/serving/rpc_client.py", "--text", "一丁七"]
        asked = subprocess.run(
            [*client, "--address", f"127.0.0.1:{ports['rpc_port']}"],
            cwd=machine.path("."),
            capture_output=True,
            text=True,
        )
        assert asked.returncode == 0 and json.loads(asked.stdout)["label"], asked.stderr
    finally:
        service.terminate()
        assert service.wait(30) == 0
    assert subprocess.run(commands["HEALTHCHECK"], cwd=machine.path("."), capture_output=True).returncode == 1


def until_ready(command, directory):
    """The status of a command that may be run several times: 0 as soon as it succeeds."""
    for _ in range(10):
        status = subprocess.run(command, cwd=directory, capture_output=True).returncode
        if status == 0:
            break
    return status


def test_the_systemd_unit_step_by_step(model, tmp_path):
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str
    unit.read(os.path.join(SERVING, "ppminilm.service"), encoding="utf-8")
    service, machine = unit["Service"], Machine(tmp_path)
    for source in ("data.py", "common", "deploy/serving"):
        machine.copy(source, source)
    machine.use_this_environment()
    os.makedirs(machine.path("/etc/ppminilm"))
    os.makedirs(machine.path("/var/log/ppminilm"))
    settings = {"http_port": free_port(), "rpc_port": free_port()}
    settings["op"] = {"ppminilm": {"local_service_conf": {"model_config": str(model)}}}
    with open(machine.path("/etc/ppminilm/config.yml"), "w") as file:
        json.dump(settings, file)
    commands = {name: machine.words(shlex.split(service[name])) for name in ("ExecStart", "ExecStartPost")}
    directory = machine.path(service["WorkingDirectory"])
    output = tmp_path / "output"
    with open(output, "wb") as file:
        main = subprocess.Popen(commands["ExecStart"], cwd=directory, stdout=file, stderr=file)
    try:
        assert subprocess.run(commands["ExecStartPost"], cwd=directory).returncode == 0, output.read_text()
        reload = [word.replace("$MAINPID", str(main.pid)) for word in shlex.split(service["ExecReload"])]
        subprocess.run(["kill", *reload[1:]], check=True)  # where /bin/kill is, depends on the machine
        until(lambda: "web_service.py: reloaded, " in output.read_text(), 60)
        assert rpc_client.wait_ready("127.0.0.1", settings["http_port"], 5)
    finally:
        main.send_signal(signal.SIGTERM)  # KillMode=mixed: to this process alone
        assert main.wait(int(service["TimeoutStopSec"])) == 0
    assert not processes(str(tmp_path))
    if shutil.which("systemd-analyze"):
        verified = subprocess.run(
            ["systemd-analyze", "verify", os.path.join(SERVING, "ppminilm.service")], capture_output=True, text=True
        )
        complaints = [line for line in verified.stderr.splitlines() if "is not executable" not in line]
        assert not complaints, complaints


def test_the_blocks_of_operation_md(quantized, tmp_path):
    """Typed as they stand there, one service after the other, but for the ports; in a clean directory with two models."""
    machine, ports = Machine(tmp_path), {"18083": str(free_port()), "8091": str(free_port())}
    for source in ("data.py", "common", "deploy/serving"):
        machine.copy(source, source)
    machine.use_this_environment()
    serving, models = machine.path("deploy/serving"), machine.path("quantization/tnews_quant_models")
    os.makedirs(models)
    for variant in ("mse4", "avg4"):
        os.symlink(quantized / variant, os.path.join(models, variant))
    os.symlink(quantized / "mse4", os.path.join(serving, "serving_server"))

    def typed(text):
        return re.sub("18083|8091", lambda port: ports[port[0]], text)

    config = os.path.join(serving, "config_nlp.yml")
    with open(config, encoding="utf-8") as file:
        settings = typed(file.read())
    with open(config, "w", encoding="utf-8") as file:
        file.write(settings)
    text = open(os.path.join(SERVING, "OPERATION.md"), encoding="utf-8").read().partition("# Operation")[0]
    watching, reloading, secure = re.findall(r"(?<!-->\n)^```sh\n(.*?)^```", text, re.M | re.S)
    env = {**os.environ, "PATH": f"{machine.path('.venv/bin')}:{os.environ['PATH']}"}

    def bash(block):
        done = subprocess.run(["bash", "-ec", block], cwd=serving, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    # The first block belongs to a service that runs: the second one starts it.
    reloaded = "for _ in $(seq 300); do curl -s localhost:18083/metrics | grep -q 'total{outcome=\"reloaded\"} 1' && break; sleep 0.2; done\n"
    out, err = bash(typed(f"{reloading}{reloaded}{watching}kill $!; wait $!"))
    assert err.count("web_service.py: reloaded, ") == 1 and "avg4 (int8)" in err and "not reloaded" not in err
    assert 'ppminilm_reloads_total{outcome="reloaded"} 1.0' in out and '"openapi": "3.1.0"' in out
    out, err = bash(typed(secure) + "wait $!")
    assert '"err_no": 0' in out and len([line for line in out.splitlines() if '"label"' in line]) == 1, (out, err)


def waiting(tmp_path, http_port, seconds):
    """(status, its line, seconds) of --wait-ready."""
    started = time.monotonic()
    config = ["--config", tmp_path / "config.yml", "--log_dir", tmp_path, "--http_port", http_port]
    done = run("--wait-ready", seconds, *config)
    return done.returncode, done.stderr, time.monotonic() - started


def test_nobody_waits_for_a_service_that_has_ended(model, tmp_path):
    """It could not start; it was killed while it loaded; it was killed when it was ready."""
    service = Service(tmp_path, tmp_path / "none")
    status, line, seconds = waiting(tmp_path, service.http, 60)
    assert status == 1 and "the service has ended" in line and len(line.splitlines()) == 1 and seconds < 20
    assert service.process.wait(10) == 2
    service = Service(tmp_path, model)
    until(lambda: len(processes(str(tmp_path))) == 2)
    service.process.kill()
    status, line, seconds = waiting(tmp_path, service.http, 60)
    assert status == 1 and "the service has ended" in line and seconds < 20
    service.process.wait(10)
    with Service(tmp_path, model) as service:  # the one before has left its file: that is no reason to give up
        assert waiting(tmp_path, service.http, 60)[0] == 0


def test_a_service_that_is_yet_to_come_is_waited_for(tmp_path):
    """Also if one with the same settings has ended long ago."""
    (tmp_path / "config.yml").write_text("{}")
    status, line, seconds = waiting(tmp_path, 18999, 3)
    assert status == 1 and "not ready after 3 s; is it running?" in line and seconds > 3
    logs = tmp_path / "PipelineServingLogs"
    logs.mkdir()
    (logs / "service_18999.lock").touch()
    os.utime(logs / "service_18999.lock", (time.time() - 60,) * 2)
    status, line, seconds = waiting(tmp_path, 18999, 4)
    assert status == 1 and "not ready after 4 s" in line and seconds > 4
