"""Parity across runtimes: engines in worker processes, comparison with the torch oracle, reports, and all tests."""
