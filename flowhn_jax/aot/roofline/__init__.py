"""The roofline of a compiled train step: the least time that its scheduled program can take.

`work` reads what each instruction computes and moves, `rates` gives the least time for it,
`pallas_schedule` and `bundles` read how long a Pallas kernel takes, `timeline` runs the schedule,
`categories` says what an instruction is for, `bound` adds up, `step_bound` does so for a config's
train step, and `render` prints it.
"""
