"""Real engines behind one protocol: each runs in a worker process that takes token ids and returns log-probabilities.

`host.RemoteEngine` is the parent's side, `worker` the child's loop; `*_engine.py` holds one engine each and imports
numpy and its own runtime only, so that it also runs under another Python.
"""
