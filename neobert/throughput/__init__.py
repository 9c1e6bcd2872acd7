"""The throughput table: NeoBERT and other encoders, as many tokens a second as each can.

The paper's Table 10 and Figure 3 (§5.4, Appendix F) with what they leave out: dtype, attention
implementation, synchronisation, torch.compile, texts of real lengths, live tokens only, latency,
memory, and the share of what the machine can do. `neobert bench` and `benchmarks/
bench_throughput.py` run it.

shapes.py     who takes part, and the arithmetic of a token
workloads.py  what they are given
models.py     the models, padded or packed, and the parity gate
measure.py    timing and the search for the best batch
worker.py     one contestant in a process of its own
run.py        processes and time budget
results.py    the results file
table.py, plot.py
"""
