"""A whole cluster in one process, from one seed: the pure code of Cordée in a world of fakes that fail.

    world.py      time, network, liveliness tokens, links; what is cut, lost, late, doubled
    machine.py    what survives a crash: disk, clock, devices; and the faults of each
    agent.py      one run of a node's agent: the real Controller and Gateway, a fake shell around them
    pipeline.py   the shell around the real Host
    stages.py     fake workers, whose tokens depend on every row that they really hold
    corrupt.py    arbitrary state in memory, on disk and in flight
    scenario.py   which machines, models, deployments, streams and faults a seed means
    checks.py     what is right
    run.py        plays a seed and judges it
    mutations.py  planted bugs that the sweep must find

`python -m sim --seed 7` plays one seed and prints what each node runs at the end; `--seeds 1000` sweeps.
"""
