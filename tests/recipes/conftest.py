"""The small model, file, recipe and finished run of the command tests, for the recipes behind them."""

from tests.cli.conftest import copied, finished, llama, recipe, rows

__all__ = ["copied", "finished", "llama", "recipe", "rows"]
