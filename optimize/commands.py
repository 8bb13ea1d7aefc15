"""All commands of `ratchet optimize`, each from its own file."""

from optimize import credit_cli
from optimize.cli import optimize_app
from optimize.rl import commands

__all__ = ["commands", "credit_cli", "optimize_app"]
