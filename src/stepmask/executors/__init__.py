"""Where independent jobs run: here, on a Ray cluster, or in the processes of torchrun; and how what is done is kept."""
