"""Features computed once: `build` encodes what is missing, `features` is what training reads.

`tiles` names what is encoded, `survey` lists what a dataset needs, `chunks` cuts it into work, `encode` does it,
`store` keeps it, and `team` shares the work among processes.
"""
