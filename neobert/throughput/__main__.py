"""`python -m neobert.throughput`: the worker, started by `neobert.throughput.run`."""

from neobert.throughput.worker import main

main()
