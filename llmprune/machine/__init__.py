"""What a run may use of the machine it is on."""
