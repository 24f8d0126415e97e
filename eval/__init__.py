"""Evaluation of trained runs (`python -m eval`). Import names from here; `eval` itself is a builtin."""
