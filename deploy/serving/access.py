"""Who may use the service: bearer tokens from a file, and TLS for both ports. Both are off by default, as the service
binds 127.0.0.1.

A token file has one token per line; empty lines and lines that begin with # do not count. `openssl rand -hex 32`
makes a token.
"""

import hashlib
import hmac
import os
import ssl
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
from common import UserError

SHORTEST_TOKEN = 16  # characters: what is shorter can be guessed by asking often
# Of OpenSSL: a certificate that is trusted itself need not lead to a root (ssl.VERIFY_X509_PARTIAL_CHAIN, Python 3.10).
PARTIAL_CHAIN = 0x80000


def read_tokens(path):
    """The tokens of a file. Raises: UserError if there are none, or if one is short or not printable ASCII."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokens_file {path}: {getattr(error, 'strerror', None) or 'not text'}") from error
    tokens = []
    for number, line in enumerate(lines, 1):  # the messages do not quote a token
        if not line or line.startswith("#"):
            continue
        if len(line) < SHORTEST_TOKEN:
            raise UserError(f"tokens_file {path}, line {number}: a token has at least {SHORTEST_TOKEN} characters")
        if not all("!" <= char <= "~" for char in line):
            raise UserError(f"tokens_file {path}, line {number}: a token has letters, digits and signs of ASCII only")
        tokens.append(line)
    if not tokens:
        raise UserError(f"tokens_file {path}: has no token, so nobody could use the service")
    return tokens


class Tokens:
    """Whether a request may pass. Args: path: of the token file; empty: every request may."""

    def __init__(self, path):
        self.digests = [_digest(token) for token in read_tokens(path)] if path else []

    def allow(self, header):
        """Whether the value of an Authorization header, or None, is ``Bearer`` and one of the tokens.

        The time that it takes does not depend on the tokens: hashes of equal length are compared, all of them.
        """
        if not self.digests:
            return True
        scheme, _, token = (header or "").partition(" ")
        given, allowed = _digest(token.strip()), False
        for digest in self.digests:
            allowed |= hmac.compare_digest(given, digest)
        return allowed and scheme.lower() == "bearer"


def _digest(token):
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def check_tls(config):
    """Raises: UserError unless certificate and key of the settings, if there are any, can be read and fit together."""
    if bool(config["tls_certificate"]) != bool(config["tls_key"]):
        raise UserError("tls_certificate and tls_key: give both, or neither")
    if config["tls_certificate"]:
        load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), config)


def load_certificate(context, config):
    """Loads certificate and key of the settings into a context, which new connections use from then on.

    Raises: UserError.
    """
    certificate, key = config["tls_certificate"], config["tls_key"]
    try:
        # The empty password: an encrypted key is an error, and not a question at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise UserError(
            f"tls_certificate {certificate}, tls_key {key}: not a certificate chain and its unencrypted key, in PEM "
            f"({error.reason or 'unreadable'})"
        ) from error
    except OSError as error:
        raise UserError(f"tls_certificate {certificate}, tls_key {key}: {error.strerror}") from error


def server_context(config):
    """The SSLContext of the HTTP port, or None without TLS."""
    if not config["tls_certificate"]:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_certificate(context, config)
    return context


def read_pair(config):
    """((key, certificate chain),) in PEM, as gRPC takes them."""
    pair = []
    for name in ("tls_key", "tls_certificate"):
        with open(config[name], "rb") as file:
            pair.append(file.read())
    return (tuple(pair),)


def grpc_credentials(config):
    """(credentials of the RPC port or None without TLS, function that takes other settings for new connections)."""
    if not config["tls_certificate"]:
        return None, lambda config: None
    import grpc

    pending = []

    def fetch():  # called at the beginning of every connection
        return pending.pop() if pending else None

    def change(config):
        pending[:] = [grpc.ssl_server_certificate_configuration(read_pair(config))]

    first = grpc.ssl_server_certificate_configuration(read_pair(config))
    return grpc.dynamic_ssl_server_credentials(first, fetch), change


def client_context(ca, local=False):
    """The SSLContext of a client. Args: ca: PEM file of the CA, or of the server's own certificate; None: the system's.
    local: the server is this machine's, whatever name its certificate has. Raises: UserError.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise UserError(f"--ca {ca}: not a certificate in PEM") from error
    except OSError as error:
        raise UserError(f"--ca {ca}: {error.strerror}") from error
    context.verify_flags |= PARTIAL_CHAIN
    context.check_hostname = not local
    return context
