"""A fleet in virtual time, request by request: the production cores of scheduler and store residency, the worker's rule
for when a migration stops, and models of everything else (devices, disks, network, workers, gateways' queues, faults).

    model     the words: hardware, deployments, arrivals, faults, options
    fleet     `Fleet(…).run()`: the world and its time
    report    what a run was: a ledger per request, counters, utilisation
    baselines other schedulers' ways to decide

`docs/simulator.md` says what is real and what is modelled.
"""
