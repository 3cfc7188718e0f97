"""The verbs that this distribution adds to the command `rondo`. Nothing here imports torch."""

from rondo_serve.config import ServeConfig

SERVE = (ServeConfig, "rondo_serve.serve:run")
