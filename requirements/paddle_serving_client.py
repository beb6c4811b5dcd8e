"""Stands in for the package of this name, which has no wheel for Python 3.10 and later; setup_env.sh puts it in place.

Paddle Serving's server and its PipelineClient import the name Client from it, and never use it.
"""


class Client:
    """The client of Paddle Serving's C++ server, which is not used here."""

    def __init__(self, *_):
        raise NotImplementedError("paddle-serving-client has no wheel for this Python; use PipelineClient or HTTP")
