"""The settings of the service: config_nlp.yml, overridden by the command line, and checked."""

import copy
import os
import resource
import socket
import sys
from typing import Literal, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", ".."))
import protocol
import pydantic
from common import UserError


def number(default, least, most):
    return pydantic.Field(default, ge=least, le=most)


def without_effect(default):
    """A setting of Paddle Serving that is taken, and goes no further: see WITHOUT_EFFECT."""
    return pydantic.Field(default, exclude=True)


class Section(pydantic.BaseModel):
    """Base class of the settings: rejects unknown names and values of the wrong type."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class LocalServiceConf(Section):
    # Paddle Serving calls this setting model_config, but pydantic reserves that name; hence the alias.
    model_directory: str = pydantic.Field("serving_server", alias="model_config")
    device_type: int = number(0, 0, 2)
    devices: str = ""
    thread_num: int = number(0, 0, 1024)
    precision: Literal["", "fp32", "bf16", "fp16", "int8"] = ""
    client_type: Literal["local_predictor"] = without_effect("local_predictor")
    fetch_list: list[str] = without_effect([])


class Operator(Section):
    concurrency: int = number(1, 1, 1)
    batch_size: int = number(32, 1, 1024)
    local_service_conf: LocalServiceConf = LocalServiceConf()


class Operators(Section):
    ppminilm: Operator = Operator()


class Tracer(Section):
    interval_s: int = -1


class Dag(Section):
    is_thread_op: bool = True
    tracer: Tracer = without_effect(Tracer())


class Settings(Section):
    """The settings of config_nlp.yml, with their defaults, smallest and largest values."""

    host: str = "127.0.0.1"
    rpc_port: int = number(8091, 1024, 65535)
    http_port: Optional[int] = number(18083, 1024, 65535)
    build_dag_each_worker: bool = without_effect(False)
    worker_num: int = number(128, 1, 512)
    timeout_ms: int = number(10_000, 1, 600_000)
    max_body_bytes: int = number(1 << 18, 1024, 1 << 26)
    max_header_bytes: int = number(8192, 1024, 1 << 20)
    request_ms: int = number(10_000, 100, 600_000)
    max_connections: int = number(512, 8, 100_000)
    max_connections_per_address: int = number(512, 8, 100_000)
    max_texts: int = number(128, 1, 10_000)
    max_text_chars: int = number(32_768, 1, 1 << 26)
    max_texts_waiting: int = number(4096, 1, 1_000_000)
    grace_ms: int = number(5000, 0, 600_000)
    tokens_file: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    log_dir: str = "."
    dag: Dag = Dag()
    op: Operators = Operators()


# Settings of Paddle Serving that its other services have: {dotted name: why it has no effect in this one}.
WITHOUT_EFFECT = {
    "build_dag_each_worker": "one process answers all requests",
    "dag.is_thread_op": "the streams of one engine compute in threads",
    "dag.tracer": "the time of each request is in the log",
    "op.ppminilm.local_service_conf.client_type": "the model always runs in this service",
    "op.ppminilm.local_service_conf.fetch_list": "an answer always has the logits",
}


# {command-line option: dotted name of the setting that it overrides}
LOCAL_SERVICE = "op.ppminilm.local_service_conf"
OPTIONS = {name: name for name in ("host", "http_port", "rpc_port", "log_dir")}
OPTIONS.update({name: name for name in ("tokens_file", "tls_certificate", "tls_key")})
NAMES = {"model": "model_config", "threads": "thread_num", "precision": "precision", "device_type": "device_type"}
OPTIONS.update((option, f"{LOCAL_SERVICE}.{name}") for option, name in NAMES.items())
PATHS = ("model", "log_dir", "tokens_file", "tls_certificate", "tls_key")
# What SIGHUP takes anew; every other setting needs a restart. Of tokens and TLS the files are read anew (access.read).
RELOADED = [f"{LOCAL_SERVICE}.{name}" for name in ("model_config", "precision", "thread_num")]
RELOADED += ["tokens_file", "tls_certificate", "tls_key"]


def check_settings(settings, source):
    """Validates settings and fills in the defaults. Returns: nested dicts with Paddle Serving's names.

    Args: source: origin of the settings, for messages. Raises: UserError that names the first invalid setting.
    """
    try:
        return Settings.model_validate(settings).model_dump(by_alias=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if not source.startswith("--config"):  # an option, which is the name that the user knows
            raise UserError(f"{source}: {first['input']!r}: {first['msg']}") from error
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: no setting is called {name}; config_nlp.yml lists all settings") from error
        raise UserError(f"{source}: {name}: {first['input']!r}: {first['msg']}") from error


def fill_in_ports(given):
    """As Paddle Serving documents it: RPC at http_port + 1 if that alone is set, no HTTP if rpc_port alone is set."""
    for name in ("http_port", "rpc_port"):
        if given.get(name, 0) is None:  # `http_port:` with nothing behind it
            del given[name]
    http_port = given.get("http_port")
    if "rpc_port" in given:
        given.setdefault("http_port", None)
    elif isinstance(http_port, int) and http_port >= 1024:  # others are refused by their own name
        given["rpc_port"] = http_port + 1


def is_given(settings, name):
    """Whether nested settings have a value under a dotted name."""
    first, _, rest = name.partition(".")
    if not isinstance(settings, dict) or first not in settings:
        return False
    return is_given(settings[first], rest) if rest else settings[first] not in (None, [])


def note_without_effect(given, path):
    """Says in one line which settings are taken without effect, and why. is_thread_op: true is what is done anyway."""
    named = [f"{name.rpartition('.')[2]} ({why})" for name, why in WITHOUT_EFFECT.items() if is_given(given, name)]
    if is_given(given, "dag.is_thread_op") and given["dag"]["is_thread_op"]:
        named = [each for each in named if not each.startswith("is_thread_op")]
    if named:
        print(f"note: {path}: without effect: {', '.join(named)}", file=sys.stderr)


def read_config(args, notes=True):
    """The settings of the config file, overridden by the command line, as nested dicts; paths are absolute.

    Args: notes: whether settings without effect are named. Raises: UserError that names the invalid setting.
    """
    import yaml

    source = f"--config {args.config}"
    try:
        with open(args.config, encoding="utf-8") as file:
            given = yaml.safe_load(file) or {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, dates that there are not
        raise UserError(f"{source}: not YAML ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from error
    if not isinstance(given, dict):
        raise UserError(f"{source}: must be settings, one `name: value` per line")
    fill_in_ports(given)
    config = check_settings(given, source)
    if notes and args.wait_ready is None:
        note_without_effect(given, args.config)
    # Paths in the file are relative to it, those on the command line to the working directory.
    base = os.path.dirname(os.path.abspath(args.config))
    for option, name in OPTIONS.items():
        section, last = place_of(config, name)
        override = getattr(args, option)
        is_path = option in PATHS
        if override is not None:
            section[last] = os.path.abspath(override) if is_path else override
            check_settings(config, f"--{option}")
        elif is_path and section[last]:
            section[last] = os.path.normpath(os.path.join(base, section[last]))
    return config


def place_of(config, name):
    """(the section that holds the setting of a dotted name, its name in there)."""
    *sections, last = name.split(".")
    for each in sections:
        config = config[each]
    return config, last


def local_service(config):
    """The settings of the model: the section local_service_conf."""
    return config["op"][protocol.SERVICE]["local_service_conf"]


def flat(config, prefix=""):
    """{dotted name: value} of nested settings."""
    found = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        found.update(flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value})
    return found


def reloaded(config, fresh):
    """(``config`` with what SIGHUP takes anew from ``fresh``, names of the other settings that differ)."""
    before, after = flat(config), flat(fresh)
    merged = copy.deepcopy(config)
    for name in RELOADED:
        section, last = place_of(merged, name)
        section[last] = after[name]
    return merged, [name for name in after if name not in RELOADED and after[name] != before.get(name)]


def check_ports(config):
    """Raises: UserError if a port is in use, or if the address does not belong to this machine."""
    for name in ("http_port", "rpc_port"):
        if config[name] is None:
            continue
        try:
            family, kind, _, _, address = socket.getaddrinfo(config["host"], config[name], type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            raise UserError(f"{name} {config[name]} on {config['host']}: {error.strerror}") from error
    if config["http_port"] == config["rpc_port"]:
        raise UserError(f"http_port and rpc_port are both {config['http_port']}")


def allow_connections(config):
    """Raises the limit of open files, of which each connection is one, as far as it may be. Raises: UserError if even
    that is too low for the settings."""
    needed = 5 * config["max_connections"] + 256  # HTTP for a moment four times, as many by RPC, and what else is open
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < needed:
        raise UserError(
            f"max_connections {config['max_connections']}: needs {needed} open files, and this user may have {most} "
            "(ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(needed, 4096) if most == resource.RLIM_INFINITY else most, most))
