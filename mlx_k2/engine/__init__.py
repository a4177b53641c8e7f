"""Who runs next: requests, sequences, slots, scheduler, microbatches. Pure: no I/O, no arrays."""
