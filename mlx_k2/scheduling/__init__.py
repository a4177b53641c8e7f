"""The next step: requests, sequences, slots, scheduler, cost model, step policy. Pure: no I/O, no arrays."""
