"""The roofline of a compiled train step: the least time that its scheduled program can take.

`work` reads what each instruction computes and moves, `pallas_schedule` how long a Pallas kernel
takes, `schedule` puts both on a time line, `categories` says what an instruction is for, and
`bound` adds up.
"""
