"""What `fedlora up` and `fedlora down` start and stop."""
