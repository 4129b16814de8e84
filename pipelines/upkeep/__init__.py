"""What one does with a dataset after its job."""
