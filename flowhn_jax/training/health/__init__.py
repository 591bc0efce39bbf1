"""What watches over a run: bad steps, preemption and hangs."""
