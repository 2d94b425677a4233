"""The experiments, each a command: ``python -m experiments`` lists them."""

import sys

from ae_jax.errors import leave_on_signals

if sys.argv[0] == "-m":  # a command is starting: it first imports for a second
    leave_on_signals()
