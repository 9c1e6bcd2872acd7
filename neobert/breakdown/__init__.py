"""Where the time goes: each op of a forward pass and of a training step against the roofline.

`neobert bench --profile` measures, on the CPU or the GPU. `work` counts what each op must compute
and move, `measure` times the ops with torch.profiler and holds their sum against the wall clock,
`cases` says what runs, `report` makes the table, the results file and the plot.
"""
