"""Arithmetic of models and runs: parameters, bytes, time; closed formulas of sizes, without torch."""
