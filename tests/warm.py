"""A Python that has Paddle and PaddleNLP imported already, for the launchers that tests run: 4 seconds less per script.

    python warm.py --serve SOCKET            # imports them, and forks for every script that it is asked for
    python warm.py SOCKET SCRIPT.py ...      # runs a script there, as if in this process

The forked process has done nothing but the imports. Arguments, working directory, environment and the three standard
streams are those of the caller, who gets the exit status and passes signals on; limits, umask, affinity and process
group are the server's. What is no script (-c, -m), and a script whose environment would change the imports, is run by
an ordinary Python.
"""

import array
import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
import traceback

# Variables that Paddle and the libraries below it read while they are imported.
READ_AT_IMPORT = ("FLAGS_", "GLOG_", "KMP_", "MKL_", "OMP_", "PADDLE_", "PPNLP_", "PYTHON")
SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What nearly every script imports, at some time; kill_at.py has it in the server that it forks, too.
PRELOADED = ["common.compat", "paddlenlp.transformers", "paddlenlp.datasets", "paddle.static"]


def import_settings(environment):
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT) and name != "PYTHON"}


def serve(path):
    settings = import_settings(os.environ)
    for module in PRELOADED:
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that look after a script
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    with open(f"{path}.settings", "w", encoding="utf-8") as file:
        json.dump(settings, file)
    os.rename(f"{path}.new", path)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return look_after(connection)
        connection.close()


def look_after(connection):
    """Runs the script that a connection asks for, and kills it if the caller has gone."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    script = os.fork()
    if script == 0:
        connection.close()
        return become(json.loads(message), descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(array.array("i", [script]).tobytes())
    connection.settimeout(0.005)
    while True:
        ended, status = os.waitpid(script, os.WNOHANG)
        if ended:
            connection.sendall(array.array("i", [os.waitstatus_to_exitcode(status)]).tobytes())
            os._exit(0)
        try:
            connection.recv(1)  # nothing, when the caller has gone: he sends nothing else
        except socket.timeout:
            continue
        except ConnectionResetError:
            pass
        os.kill(script, signal.SIGKILL)
        os.waitpid(script, 0)
        os._exit(0)


def become(request, descriptors):
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    # This project's own modules are imported anew, from where the script is: it may be a copy of the repository.
    for name in [name for name in sys.modules if name.partition(".")[0] == "common"]:
        del sys.modules[name]
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
    # The end of a Python without what takes longest, to free what the imports have made (1.2 s).
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def call(path, arguments):
    """In the caller's process."""
    arguments = arguments[1:] if arguments[:1] == ["-u"] else arguments
    with open(f"{path}.settings", encoding="utf-8") as file:
        fits = json.load(file) == import_settings(os.environ)
    if not fits or not arguments or not arguments[0].endswith(".py"):
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": arguments, "directory": os.getcwd(), "environment": dict(os.environ)}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    script = receive(connection)
    for number in SIGNALS:
        signal.signal(number, lambda number, _: os.kill(script, number))
    status = receive(connection)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def receive(connection):
    message = connection.recv(4)
    return array.array("i", message)[0] if message else 1


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path[0] = os.path.dirname(sys.path[0])  # the repository
        serve(sys.argv[2])
    else:
        call(sys.argv[1], sys.argv[2:])
