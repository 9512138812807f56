"""What a run uses of the machine: device, memory, processes, threads, signals."""
