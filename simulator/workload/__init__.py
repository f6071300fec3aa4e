"""Workloads: who asks for what and when.

    trace       a workload in columns, and what it really was (rate, CV)
    arrivals    Poisson, gamma renewal with a CV, minute counts, recorded time stamps
    popularity  which part of the requests each deployment gets
    lengths     prompt and output tokens
    files       the real traces and the user's own
    named       from a name or a file to a workload

All of it is a function of its seed. `docs/simulator.md` has the chapter about it.
"""
