"""Text that a trained model continues."""
