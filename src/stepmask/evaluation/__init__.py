"""What a schedule is worth: fidelity, time, memory, pictures."""
