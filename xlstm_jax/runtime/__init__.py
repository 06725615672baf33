"""What keeps a run's processes alive, together and accounted for."""
