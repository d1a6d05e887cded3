"""What runs at the coordinator: the round loop, strategies, storage, the simulation."""
