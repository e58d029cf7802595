"""What fits a device, and how fast it would be there."""
