"""Who may use the service: bearer tokens from a file, and TLS for both ports. Both are off by default, as the service
binds 127.0.0.1.

A token file has one token per line; empty lines and lines that begin with # do not count. `openssl rand -hex 32`
makes a token. The supervisor reads the files and hands their content to the worker, so that a worker that is started
anew has what was found good, whatever the files hold by then.
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


def read(config):
    """What the settings allow, as an object for JSON: ``tokens``, hashes, empty if everybody may ask; ``certificate``
    and ``key``, in PEM, empty without TLS. Raises: UserError for files that are no good.
    """
    tokens = read_tokens(config["tokens_file"]) if config["tokens_file"] else []
    certificate, key = config["tls_certificate"], config["tls_key"]
    if bool(certificate) != bool(key):
        raise UserError("tls_certificate and tls_key: give both, or neither")
    allowed = {"tokens": [_hash(token).hex() for token in tokens], "certificate": "", "key": ""}
    if certificate:
        named = {"certificate": certificate, "key": key}
        for name, path in named.items():
            try:
                with open(path, encoding="utf-8") as file:
                    allowed[name] = file.read()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or "not PEM"
                raise UserError(f"tls_{name} {path}: {why}") from error
        try:
            server_context(allowed)
        except ssl.SSLError as error:
            raise UserError(
                f"tls_certificate {certificate}, tls_key {key}: not a certificate chain and its unencrypted key, in "
                f"PEM ({error.reason or 'unreadable'})"
            ) from error
    return allowed


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
    """Whether a request may pass. Args: hashes: of the tokens, in hexadecimal; without any, every request may."""

    def __init__(self, hashes):
        self.hashes = [bytes.fromhex(one) for one in hashes]

    def allow(self, header):
        """Whether the value of an Authorization header, or None, is ``Bearer`` and one of the tokens.

        The time that it takes does not depend on the tokens: hashes of equal length are compared, all of them.
        """
        if not self.hashes:
            return True
        scheme, _, token = (header or "").partition(" ")
        given, allowed = _hash(token.strip()), False
        for one in self.hashes:
            allowed |= hmac.compare_digest(given, one)
        return allowed and scheme.lower() == "bearer"


def _hash(token):
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def server_context(allowed):
    """The SSLContext of the HTTP port, or None without TLS. Args: allowed: as of read()."""
    if not allowed["certificate"]:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # OpenSSL reads files only: these are in memory. The empty password: an encrypted key is an error, and no question.
    memory = [os.memfd_create(name) for name in ("certificate", "key")]
    try:
        for number, name in zip(memory, ("certificate", "key")):
            with open(number, "w", closefd=False) as file:
                file.write(allowed[name])
        context.load_cert_chain(*(f"/proc/self/fd/{number}" for number in memory), password="")
    finally:
        for number in memory:
            os.close(number)
    return context


def rpc_certificate(allowed):
    """The same for the RPC port: grpc.ServerCertificateConfiguration, or None."""
    import grpc

    if not allowed["certificate"]:
        return None
    pair = allowed["key"].encode(), allowed["certificate"].encode()
    return grpc.ssl_server_certificate_configuration([pair])


def client_context(ca, on_this_machine=False):
    """The SSLContext of a client. Raises: UserError.

    Args:
        ca: PEM file of the CA, or of the server's own certificate; None: the CAs of the system.
        on_this_machine: the server has this certificate, whatever name is in it.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise UserError(f"--ca {ca}: not a certificate in PEM") from error
    except OSError as error:
        raise UserError(f"--ca {ca}: {error.strerror}") from error
    context.verify_flags |= PARTIAL_CHAIN
    context.check_hostname = not on_this_machine
    return context
